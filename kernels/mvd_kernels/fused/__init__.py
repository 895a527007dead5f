"""The operators as Triton kernels. Import them only where Triton is installed.

Each is an operator of torch's library too: to `torch.compile` it is one call whose result has a known shape.
"""
