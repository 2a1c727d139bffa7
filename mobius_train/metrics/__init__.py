"""Metrics of a run: metric files, trackers, and the motion of clips."""
