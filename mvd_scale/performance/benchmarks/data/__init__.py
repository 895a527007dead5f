"""Benchmarks of loaders of clips and evaluation views, and of manifests."""
