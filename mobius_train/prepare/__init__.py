"""From a heap of pictures and videos to training shards.

`recipe` says what is done; `run` does it part by part; `stages` judge and change clips; `report` tells what happened.
"""
