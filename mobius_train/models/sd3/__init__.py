"""The transformer of Stable Diffusion 3 and 3.5 as a backbone, and the ring for it."""
