"""Decoding of videos: samples for a DALI graph, the graph itself, and PyAV."""
