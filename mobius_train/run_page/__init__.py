"""The page of a run: curves, samples, recipe and the command to continue, in one HTML file."""
