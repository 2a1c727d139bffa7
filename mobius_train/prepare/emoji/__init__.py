"""The embedded data set: Microsoft's Fluent Emoji, their names and their shards."""
