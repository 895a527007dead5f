"""Fine-tuning of a pre-trained encoder: the task interface, classification, validation."""
