"""The diffusion process: noise and target in training, the sampler, and where random numbers come from."""
