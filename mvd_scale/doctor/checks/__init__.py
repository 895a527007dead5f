"""Checks by group: those of a host alone, and those that hosts make together."""
