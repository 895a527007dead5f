"""Clips that need no download: real ones cut from installed packages, and synthetic ones with labels."""
