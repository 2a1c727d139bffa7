"""The ring beside a transformer: whatever the families of transformers share."""
