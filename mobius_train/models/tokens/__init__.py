"""The ring of a transformer: the code that all families of transformers share."""
