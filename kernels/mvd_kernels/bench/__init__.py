"""Benchmarks of the operators, one file each, run by `python -m mvd_kernels.bench`."""
