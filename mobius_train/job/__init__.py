"""This process as one of a job: its rank, the other ranks, requests to stop, earlier failures."""
