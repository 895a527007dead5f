"""Speed and memory: what they are, measured."""
