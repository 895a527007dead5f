"""Checkpoints of runs: states of training in pieces that fit any number of ranks and any ZeRO stage."""
