"""Operators in C++ that are compiled once on the machine that uses them, for its CPU, by its compiler."""
