"""The records of the kill benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from killed_job import add_job_arguments, run_seeds, total

from mobius_train.errors import MobiusError


def arguments(record: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_job_arguments(parser)
    return parser.parse_args(["--record", str(record), *options])


def test_totals_add_counts_keep_the_longest_time_and_need_every_flag() -> None:
    first = {"kills": 3, "seconds": 1.5, "equal": True, "found": {"old": 1, "new": 2}}
    second = {"kills": 4, "seconds": 0.5, "equal": False, "found": {"new": 4, "none": 1}}
    found = {"old": 1, "new": 6, "none": 1}
    assert total([first, second]) == {"kills": 7, "seconds": 1.5, "equal": False, "found": found}


def test_a_record_grows_by_seeds_and_none_is_run_twice(tmp_path: Path) -> None:
    record, ran = tmp_path / "record.json", []

    def campaign(seed: int) -> dict[str, Any]:
        if seed == 2:
            raise MobiusError("lost")
        ran.append(seed)
        return {"kills": 5}

    run_seeds(arguments(record, "--seeds", "0", "1"), "kills", campaign)
    run_seeds(arguments(record, "--seeds", "1", "3"), "kills", campaign)
    with pytest.raises(MobiusError, match="lost"):
        run_seeds(arguments(record, "--seeds", "2"), "kills", campaign)
    assert ran == [0, 1, 3]
    assert json.loads(record.read_text())["total"] == {"kills": 15}
    with pytest.raises(MobiusError, match="other settings"):
        run_seeds(arguments(record, "--ranks", "2"), "kills", campaign)
