"""Weights that go in and out of a run, and the checkpoints it resumes from."""
