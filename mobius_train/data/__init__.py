"""Clips and captions: reading from shards or folders, ordering, batching, caching."""
