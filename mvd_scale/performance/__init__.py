"""Performance: prediction (`plan`), benchmarks (`bench`) and profiles of speed and memory."""
