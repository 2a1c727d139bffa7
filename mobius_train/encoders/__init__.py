"""The frozen autoencoder and text encoders, which map pixels and captions to latents and embeddings."""
