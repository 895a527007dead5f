"""Layers of the transformers that torch lacks."""
