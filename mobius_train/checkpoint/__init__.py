"""Checkpoints: a run's state as safetensors and JSON, written atomically and verified before reading."""
