"""The transformer of Stable Diffusion 3, and its video models."""
