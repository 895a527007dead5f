"""Configuration of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run: a failure must come from the change that is tested.
settings.register_profile("same examples", derandomize=True, deadline=None)
settings.load_profile("same examples")
