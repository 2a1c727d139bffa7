"""Trackers of a run: TensorBoard, Weights & Biases and MLflow. They receive the figures of metrics.jsonl."""
