"""Writing of clips as GIF and video, and of contact sheets of several clips."""
