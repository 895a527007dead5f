"""Evaluation of models: classification, frozen features, predictions, and reports about them."""
