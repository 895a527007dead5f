"""The benchmarks of `mvd-scale bench`."""
