"""Metrics of a run: summed on the device, averaged over ranks at each reading, and written by rank 0 to its sinks."""
