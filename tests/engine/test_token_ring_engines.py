"""A ring beside a transformer, and its serial models, train alike in the engines, whatever they shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch
from recipes import DS_CONFIGS

# Stages 0 and 1 hold whole gradients, as test_engines.py compares with stage 2.
CASES = [f"parallel:{engine}" for engine in ("zero2", "zero3", "fsdp")] + ["serial:zero3", "full:fsdp"]
MODES = ("parallel", "serial", "full")


@pytest.mark.distributed
def test_sharded_and_recomputed_it_trains_as_plain_adamw_on_the_whole_batch(tmp_path: Path) -> None:
    worker = Path(__file__).parent / "token_ring_worker.py"
    finished = launch(2, worker, str(DS_CONFIGS), str(tmp_path), ",".join(CASES))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    seen = json.loads((tmp_path / "2-rings.json").read_text())
    assert all(seen.pop(mode) > 1e-2 for mode in MODES)
    assert {name: apart for name, apart in seen.items() if apart > 1e-5} == {}
    assert set(seen) == set(CASES)
