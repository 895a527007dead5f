"""Verification of the operators on a device against their references in float32 on the CPU."""
