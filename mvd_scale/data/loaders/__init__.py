"""Iterators over batches: training clips, views of a test, one video."""
