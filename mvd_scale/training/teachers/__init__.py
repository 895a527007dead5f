"""Frozen teachers during training: placement, precision, sharding, prefetch, CUDA graphs and fidelity."""
