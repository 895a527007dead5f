"""`mvd-scale doctor`: checks of one node, or of all hosts of a job, before a run begins."""
