"""`mvd-scale profile`: traces of real steps, and their summary."""
