"""Trackers of a run: TensorBoard, Weights & Biases and MLflow. They follow metrics.jsonl, which stays the record."""
