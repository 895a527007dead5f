"""Helpers without knowledge of the project: logging, files, memory, environment."""
