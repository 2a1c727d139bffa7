"""Microsoft's Fluent Emoji as a source of clips: packages and names."""
