"""What is planned for the engines against what they really allocate, on two gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch
from recipes import recipe, write

from mobius_train.config import load
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.engine.spread import Spread
from mobius_train.plan import Planner
from mobius_train.plan.planner import ENCODERS, engine_memory, peaks_of_phases

RANKS = 2
CASES = (
    "zero0:bf16:gradient_accumulation_steps=1",
    "zero2:bf16",
    "zero3:no:gradient_accumulation_steps=1",
    "fsdp:bf16",
    "fsdp:no:fsdp.reshard_after_forward=false:gradient_accumulation_steps=1",
)
# Tiny parameters would all stay whole at stage 3, and one bucket would hold them all.
SMALL = {"reduce_bucket_size": 200_000}
PREFETCH = {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 50_000}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, clips_folder: Path) -> Path:
    """A recipe, and DeepSpeed configurations with buckets of a tiny model's size."""
    folder = tmp_path_factory.mktemp("memory")
    write(folder / "recipe.yaml", recipe(tiny_pipeline, clips_folder, folder / "run", gradient_accumulation_steps=2))
    for stage in range(4):
        zero: dict[str, Any] = {"stage": stage} | (SMALL if stage else {}) | (PREFETCH if stage == 3 else {})
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, dict[str, int]]:
    worker = Path(__file__).parent / "engine_memory_worker.py"
    result = launch(RANKS, worker, str(folder / "recipe.yaml"), str(folder), str(folder), ",".join(CASES))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    seen: dict[str, dict[str, int]] = json.loads((folder / "measured.json").read_text())
    return seen


@pytest.fixture(scope="module")
def planner() -> Planner:
    """One for all cases: those of a precision share a simulation."""
    return Planner()


def planned(planner: Planner, folder: Path, case: str) -> tuple[int, int]:
    """Bytes between steps, and the most beside them in a step; frozen models, encoders and the context apart."""
    engine, precision, *overrides = case.split(":")
    overrides += [f"mixed_precision='{precision}'", "data.validation=null", "validation={}"]
    config = load(folder / "recipe.yaml", overrides)
    layout = Spread.over(RANKS, "fsdp")
    if engine != "fsdp":
        layout = Spread.over(RANKS, ds_json=read_ds_json(folder / f"{engine}.json"))
    sim = planner.simulation(config)
    memory = engine_memory(config, layout)(sim)
    phases = peaks_of_phases(config, sim, memory, layout)
    most = max(sum(parts.values()) - parts[ENCODERS] for parts in phases.values())
    return sum(memory.resident.values()), most


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_an_engine_allocates(
    measured: dict[str, dict[str, int]], folder: Path, planner: Planner, case: str
) -> None:
    resident, beside = planned(planner, folder, case)
    assert resident == pytest.approx(measured[case]["resident"], rel=0.02)
    assert beside == pytest.approx(measured[case]["beside"], rel=0.05)
