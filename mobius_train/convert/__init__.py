"""Conversions between checkpoints and model folders, each with a complete report and a check of the output."""
