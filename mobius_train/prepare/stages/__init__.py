"""The stages of data preparation, one file for each, named as in the recipe."""
