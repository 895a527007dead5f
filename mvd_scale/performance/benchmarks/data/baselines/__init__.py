"""Plain data paths built on other libraries, which the benchmarks compare with."""
