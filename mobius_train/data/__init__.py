"""Clips and captions: read from shards or folders, ordered, batched, cached."""
