"""The UNet of Stable Diffusion 1.x, 2.x and XL as a backbone, and the ring for it."""
