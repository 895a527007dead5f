"""Frozen teachers during training: device, precision and shards, prefetch, CUDA graphs, fidelity."""
