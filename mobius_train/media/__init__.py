"""Clips as files that a person can look at: GIF, video, and a contact sheet of several clips."""
