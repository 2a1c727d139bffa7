"""The preflight's question whether the plan fits: a GPU that has too little free is named, with its rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import DS_CONFIGS, recipe, write

from mobius_train.config import RunConfig, load
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch
from mobius_train.plan import Planner, fit
from mobius_train.plan.planner import CONTEXT

pytestmark = pytest.mark.usefixtures("process_group")
SPREADS = {"zero2": Spread.over(1, ds_json=read_ds_json(DS_CONFIGS / "zero2.json")), "fsdp": Spread.over(1, "fsdp")}
ZERO2 = SPREADS["zero2"]


@pytest.fixture
def distributed() -> Distributed:
    return Distributed(Launch(rank=0, local_rank=0, world_size=1, local_world_size=1))


@pytest.fixture
def config(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> RunConfig:
    return load(write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out")))


@pytest.fixture(scope="module")
def planner() -> Planner:
    """One for all plans of this file, which simulates the recipe once."""
    return Planner()


@pytest.mark.slow
@pytest.mark.parametrize("engine", SPREADS)
def test_a_byte_too_little_is_named_and_enough_is_not(
    config: RunConfig, distributed: Distributed, monkeypatch: pytest.MonkeyPatch, engine: str, planner: Planner
) -> None:
    monkeypatch.setattr(fit, "plan", planner.plan)
    # The simulation does not depend on where the run is written.
    config = config.model_copy(update={"output_dir": Path("out")})
    needed = planner.plan(config, SPREADS[engine]).peak - CONTEXT
    for free, count in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(fit, "free_memory", lambda free=free: free)
        told, problems, planned = fit.fit(config, SPREADS[engine], distributed)
        assert planned == needed
        assert "GiB planned" in told
        assert len(problems) == count
    assert problems[0].startswith(f"rank 0 on {distributed.nodes[0]}: its GPU has 0.")


def test_without_a_gpu_or_when_not_asked_nothing_is_planned(config: RunConfig, distributed: Distributed) -> None:
    assert fit.fit(config, ZERO2, distributed) == ("no GPU to plan for", [], None)
    unasked = config.model_copy(update={"check_memory": False})
    assert fit.fit(unasked, ZERO2, distributed) == ("memory not planned", [], None)


def test_what_cannot_be_planned_says_how_to_start_all_the_same(
    config: RunConfig, distributed: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda: 2**40)
    unknown = config.model_copy(update={"vae_name_or_path": "nobody/knows"})
    with pytest.raises(MobiusError, match=r"nobody/knows.*check_memory=false"):
        fit.fit(unknown, ZERO2, distributed)
