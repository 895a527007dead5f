"""Pictures and pages: clips, predictions, reports."""
