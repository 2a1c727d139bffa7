"""Measurements of real steps: memory, saved tensors, and the proof that the frozen branch has no graph."""
