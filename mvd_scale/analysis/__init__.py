"""What models see in clips: similarity of features over time, and pictures of features, predictions and attention."""
