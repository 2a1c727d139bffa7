"""What each stage trains: the loss, the held-out loss, the samples and the exported model."""
