"""Build the parts of a run from a recipe: models, data, memory options."""
