"""Real steps are measured as they are planned; each variant in a process of its own."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import python
from recipes import DS_CONFIGS, REPOSITORY, recipe, write
from unets import tiny_unet

from mobius_train import config as configuration
from mobius_train.engine.spread import spread_of
from mobius_train.errors import MobiusError
from mobius_train.job.environment import Launch
from mobius_train.measure.measure import OTHER, Measurement, by_branch, measure
from mobius_train.measure.side_by_side import overrides_of
from mobius_train.measure.versus_plan import planned, rows
from mobius_train.models import build_denoiser
from mobius_train.plan import Plan
from mobius_train.plan.planner import ENCODERS
from mobius_train.plan.zero_states import FROZEN, MASTERS, OPTIMIZER, TRAINED

EMOJI = REPOSITORY / "configs" / "emoji.yaml"
ALONE = Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)
ZERO2 = DS_CONFIGS / "zero2.json"


@pytest.fixture(autouse=True)
def _one_rank(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed wants it of whoever starts a process.
    monkeypatch.setenv("LOCAL_RANK", "0")
    # The default recipe's paths are relative to the repository.
    monkeypatch.chdir(REPOSITORY)


def measured(path: Path, *overrides: str, ds_path: Path | None = ZERO2, **options: Any) -> Measurement:
    spread = spread_of("fsdp" if ds_path is None else "deepspeed", ds_path, ALONE)
    return measure(configuration.load(path, overrides), path, spread, warmup=0, steps=1, **options)


def planned_and_measured(path: Path, *overrides: str, ds_path: Path | None = ZERO2) -> tuple[Plan, Measurement]:
    spread = spread_of("fsdp" if ds_path is None else "deepspeed", ds_path, ALONE)
    return planned(configuration.load(path, overrides), path, spread), measured(path, *overrides, ds_path=ds_path)


@pytest.fixture
def tiny(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> Path:
    # Only a training step is measured.
    without: dict[str, Any] = {"data": {"validation": None}, "validation": {"prompts": []}}
    return write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out", **without))


@pytest.mark.slow
def test_the_default_recipe_saves_what_was_planned_within_1_percent() -> None:
    # The plan is of a GPU's attention kernels; which ones auto takes on a CPU is another matter.
    plan, found = planned_and_measured(EMOJI, "attention_backend=sdpa", "train_batch_size=1")
    assert sum(found.saved.values()) > 75e6
    assert sum(plan.saved.values()) == pytest.approx(sum(found.saved.values()), rel=0.01)
    assert plan.saved.keys() == found.saved.keys()
    components = [row for row in rows(plan, found) if row.name in found.components]
    assert {row.name for row in components} >= {TRAINED, FROZEN, MASTERS, OPTIMIZER}
    assert all(row.planned == pytest.approx(row.measured, rel=0.01) for row in components)


@pytest.mark.slow
def test_a_plan_of_another_recipe_does_not_agree(tiny: Path) -> None:
    # The control of the test above.
    plan, found = planned_and_measured(tiny, "mode=serial")
    total = sum(found.saved.values())
    assert sum(plan.saved.values()) == pytest.approx(total, rel=0.02)
    config = configuration.load(tiny, ["mode=serial", "train_batch_size=3"])
    other = planned(config, tiny, spread_of("deepspeed", ZERO2, ALONE))
    assert sum(other.saved.values()) > 1.2 * total


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("frozen_int8=true", "mixed_precision=bf16")], ids=["plain", "int8"])
def test_fsdp_keeps_what_is_planned_too(tiny: Path, overrides: tuple[str, ...]) -> None:
    plan, found = planned_and_measured(tiny, *overrides, ds_path=None)
    assert sum(plan.saved.values()) == pytest.approx(sum(found.saved.values()), rel=0.02)
    components = {row.name: row for row in rows(plan, found) if row.name in found.components}
    assert {MASTERS, OPTIMIZER} <= components.keys()
    # The plan counts blocks of 512 bytes, of which scales of eight-bit weights take one each.
    near = [row.planned == pytest.approx(row.measured, rel=0.02, abs=250 * 512) for row in components.values()]
    assert all(near)
    assert (found.components[FROZEN] < 1.5e6) == bool(overrides)


@pytest.mark.slow
def test_random_models_and_cached_batches_keep_as_much_as_real_ones(tiny: Path, tmp_path: Path) -> None:
    real = measured(tiny)
    random = measured(tiny, "data.train=/nowhere", random_models=True)
    cached = measured(tiny, f"data.cache_dir={tmp_path / 'cache'}")
    assert real.saved == random.saved == cached.saved
    # With a cache the encoders are away.
    encoders = {ENCODERS: real.components[ENCODERS]}
    assert real.components == random.components == cached.components | encoders
    # Nothing is written, neither a cache nor a run.
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_a_snapshot_needs_a_gpu(tiny: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MobiusError, match="--snapshot"):
        measured(tiny, snapshot=tmp_path / "snapshot.pickle")


@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_bytes_are_summed_by_branch(mode: Any) -> None:
    denoiser: Any = build_denoiser(tiny_unet("emoji"), "text-to-video", mode)
    frozen, layers, head = {
        "parallel": ("spatial.conv_in", "ring.transformer_in.proj_in", "ring.fusion"),
        "serial": ("unet.conv_in", "temporal.transformer_in.proj_in", "unet.conv_out"),
    }[mode]
    names = {name for name, _ in denoiser.named_modules()}
    assert {frozen, layers, head} <= names
    nbytes = {frozen: 1, layers: 20, head: 300, type(denoiser).__name__: 4000, "vae.decoder": 50000}
    temporal = "ring" if mode == "parallel" else "temporal layers"
    # A serial model's own forward pass is the spatial walk; a parallel one's own work is in no branch.
    own = {"spatial": 4001, OTHER: 50000} if mode == "serial" else {"spatial": 1, OTHER: 54000}
    assert by_branch(nbytes, denoiser) == {temporal: 20, "fusion and head": 300} | own


def test_a_variant_is_a_mode_and_changes() -> None:
    assert overrides_of("parallel") == ("mode=parallel",)
    assert overrides_of("serial+recompute+train_batch_size=4") == (
        "mode=serial",
        "gradient_checkpointing=true",
        "train_batch_size=4",
    )
    for variant, wrong in (("ring", "ring"), ("parallel+recomputed", "recomputed")):
        with pytest.raises(MobiusError, match=f"'{wrong}'"):
            overrides_of(variant)


@pytest.mark.distributed
def test_a_variant_that_fails_is_named_and_the_others_are_measured(tiny: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    options = ("--config", str(tiny), "--warmup", "0", "--steps", "1", "--json", str(record))
    variants = ("--modes", "parallel+data.train=/nowhere", "parallel+recompute")
    result = python("tools/measure_memory.py", *options, *variants, timeout=500, HF_HUB_OFFLINE="1")
    found = json.loads(record.read_text())
    assert result.returncode == 1
    assert "/nowhere" in result.stderr
    assert "error" in found["parallel+data.train=/nowhere"]
    good = found["parallel+recompute"]
    assert good["config"]["gradient_checkpointing"] is True
    assert good["versions"]["torch"] == metadata.version("torch")
    assert "saved for backward" in result.stdout
