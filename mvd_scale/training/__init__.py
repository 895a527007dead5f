"""Pre-training under DeepSpeed."""
