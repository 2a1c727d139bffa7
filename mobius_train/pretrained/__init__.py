"""Pretrained models of diffusers and transformers: locations, a strict loader, the cause if a model does not load."""
