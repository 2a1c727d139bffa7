"""From a recipe to the parts of a run: models, data, memory options."""
