"""The frozen autoencoder and text encoders: pixels and captions to latents and embeddings."""
