"""The page of a run: curves, samples, recipe and how to go on, in one HTML file."""
