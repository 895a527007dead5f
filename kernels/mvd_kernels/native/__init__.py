"""Operators in C++ for the CPU that runs them, compiled once by its own compiler."""
