"""Data preparation: from raw pictures and videos to training shards.

`recipe` defines the configuration, `preparation` runs it part by part, `stages` filter and change clips, and
`prepare_report` summarises the result.
"""
