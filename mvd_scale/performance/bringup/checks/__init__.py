"""The checks of a bring-up, a file for each stage and its helpers."""
