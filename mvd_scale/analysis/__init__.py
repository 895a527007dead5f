"""Similarity of features over time, and pictures of features, predictions and attention in clips."""
