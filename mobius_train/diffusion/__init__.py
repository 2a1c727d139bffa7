"""The diffusion process: noise and target in training, the sampler, and the random numbers."""
