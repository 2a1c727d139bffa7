"""Training in stages: several runs, one after the other, by one command."""
