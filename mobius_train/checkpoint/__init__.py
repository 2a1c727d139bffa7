"""Saving a run's state, and going on from it."""
