"""Roofline of a training step: the work of its parts at the rates that the same machine reaches in the same run."""
