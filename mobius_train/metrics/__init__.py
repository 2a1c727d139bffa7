"""Metrics of a run: metric files, TensorBoard, peak memory and the motion of clips."""
