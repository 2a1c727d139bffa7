"""Pretrained models of diffusers and transformers: where they are, why one does not load, and a strict loader."""
