"""Operators in plain torch: CPUs run them, and tests compare the kernels of `mvd_kernels.triton_ops` with them."""
