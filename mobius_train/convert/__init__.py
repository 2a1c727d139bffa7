"""Conversions between checkpoints and model folders, each with a strict report and a check of what was written."""
