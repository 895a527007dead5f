"""Masked Video Distillation at scale."""

__version__ = "0.1.0"
