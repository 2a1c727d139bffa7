"""The training stages: loss, held-out loss, samples and exported model of each."""
