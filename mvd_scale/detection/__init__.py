"""Action detection: the actions that each person on a key frame performs (AVA v2.2)."""
