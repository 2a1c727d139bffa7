"""The stages of data preparation, one file per stage, named as in the recipe."""
