"""Evaluation of clips: figures of quality and motion, and blind preference by people."""
