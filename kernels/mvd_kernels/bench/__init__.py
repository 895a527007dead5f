"""How fast the operators are: a file an operator, timed by `python -m mvd_kernels.bench`."""
