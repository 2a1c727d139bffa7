"""Names of what a run writes into its folder. The room that writes a file and the rooms that read it take its name from
here."""

from __future__ import annotations

RECIPE = "config.yaml"
METRICS = "metrics.jsonl"
# Names the newest checkpoint.
LATEST = "latest"
# Marks a requested stop for scripts. Exit codes are not reliable, because srun kills the other ranks after the first.
STOPPED = "stopped"
FAILURES = "failures.jsonl"
# The identity of each tracker's run.
TRACKER_RUNS = "trackers.json"
# The summary that the run prints before its first step.
OVERVIEW = "overview.txt"
PAGE = "report.html"
FILES = (RECIPE, METRICS, LATEST, STOPPED, FAILURES, TRACKER_RUNS, OVERVIEW, PAGE)

FINAL = "final"
LOGS = "logs"
SAMPLES = "samples"
FOLDERS = (LOGS, SAMPLES, FINAL)
# What a start writes before all its input has been checked. The recipe marks a run that has begun.
BEFORE_THE_RECIPE = frozenset({OVERVIEW, LOGS, TRACKER_RUNS})
