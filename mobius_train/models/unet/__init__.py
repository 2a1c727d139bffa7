"""The UNet of Stable Diffusion 1.x and 2.x as a backbone, and the ring for it."""
