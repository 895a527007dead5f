"""`mvd-scale plan`: memory, time and communication of a run, predicted."""
