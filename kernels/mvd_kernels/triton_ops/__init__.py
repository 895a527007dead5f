"""Operators as Triton kernels. Import them only if Triton is installed.

Each is registered as a custom operator of torch: `torch.compile` treats it as one call with a result of known shape.
"""
