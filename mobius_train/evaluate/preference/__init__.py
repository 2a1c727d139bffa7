"""Blind comparison of two models by people: a page with pairs of clips, its key, and the tally of the votes."""
