"""Microsoft's Fluent Emoji as a source of clips: their packages and their names."""
