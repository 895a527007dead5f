"""Operators in plain torch: CPUs run them, and tests compare the kernels of `mvd_kernels.fused` with them."""
