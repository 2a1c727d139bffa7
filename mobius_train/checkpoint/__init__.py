"""Checkpoints: a run's state as safetensors and JSON, written crash-safe, verified before it is read."""
