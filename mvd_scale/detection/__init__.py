"""Action detection: which actions each person of a key frame does (AVA v2.2)."""
