"""The operators in plain torch: what CPUs run, and what the kernels of `mvd_kernels.fused` are judged by."""
