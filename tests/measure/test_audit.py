"""The proof that the spatial branch is outside of the graph holds for the parallel mode, and fails for the others."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import python
from recipes import DEEP, DS_CONFIGS, REPOSITORY, recipe, write
from tiny_sd import save_sd3, save_sdxl
from torch.utils._pytree import tree_map_only

from mobius_train import config as configuration
from mobius_train.engine.spread import spread_of
from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.job.environment import Launch
from mobius_train.measure import audit as auditing
from mobius_train.measure.audit import Audit, audit
from mobius_train.models import parallel_model

pytestmark = pytest.mark.slow

OWNS, HAS_SAVED = "owns an autograd node", "has saved a tensor for the backward pass"
NODES, SAVED = f"no spatial module {OWNS}", f"no spatial module {HAS_SAVED}"
LEAVES = "all leaves of the graph are trained parameters outside the spatial branch"
NONZERO = "every trained parameter gets a non-zero gradient within {} steps"
HASH = "the spatial weights' hash is unchanged"

# What is proven depends on no size.
SMALL: dict[str, Any] = {"train_batch_size": 1, "data": {"num_frames": 2, "resolution": 16}}
ALONE = Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)
TOOL = REPOSITORY / "tools" / "audit_graph.py"


@pytest.fixture
def one_rank(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed wants it of whoever starts a process.
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture
def audited(one_rank: None, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> Any:
    def run(
        steps: int = 2, zero: int = 2, claimed: int | None = None, pipeline: Path = tiny_pipeline, **changes: Any
    ) -> Audit:
        values = recipe(pipeline, clips_folder, tmp_path / "out", **SMALL | changes)
        path = write(tmp_path / "recipe.yaml", values)
        spread = spread_of("deepspeed", DS_CONFIGS / f"zero{zero}.json", ALONE)
        return audit(configuration.load(path), spread, steps, claimed)

    return run


def failed(found: Audit) -> set[str]:
    return {claim.what for claim in found.claims if not claim.proven}


def offenders(found: Audit, what: str) -> tuple[str, ...]:
    return next(claim.offenders for claim in found.claims if claim.what == what)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 2},
        {"frozen_ahead": True},
        {"frozen_int8": True},
    ],
)
def test_the_parallel_mode_is_proven(audited: Any, changes: dict[str, Any]) -> None:
    found = audited(**changes)
    assert failed(found) == set()
    assert found.saved.total > 0
    assert list(found.saved.nbytes.values()) == sorted(found.saved.nbytes.values(), reverse=True)
    assert all(name == "(outside of modules)" or name.startswith("ring") for name in found.saved.nbytes)
    assert sum(found.nodes.values()) > 100
    assert all(name.startswith("ring") for name in found.nodes)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"ring_width": 0, "frozen_ahead": True}])
def test_in_front_of_the_fusion_it_is_proven_at_a_depth(audited: Any, changes: dict[str, Any]) -> None:
    found = audited(**DEEP | changes)
    assert failed(found) == set()
    assert any(name.startswith("spatial.up_blocks") for name in found.nodes)


def test_a_trained_tail_leaves_no_frozen_block_in_the_graph(audited: Any) -> None:
    found = audited(trained_tail=True, **DEEP)
    assert failed(found) == set()
    assert all(name.startswith("ring") for name in found.nodes)
    assert any(name.startswith("ring.tail.0.resnets") for name in found.nodes)


@pytest.mark.parametrize(
    ("claimed", "fails"),
    [
        (0, {NODES, SAVED}),
        (2, {"the last 2 blocks own autograd nodes"}),
    ],
)
def test_another_depth_than_the_models_is_not(audited: Any, claimed: int, fails: set[str]) -> None:
    found = audited(claimed=claimed, **DEEP)
    assert failed(found) == fails
    for what in fails:
        assert all(name.startswith("spatial.up_blocks") for name in offenders(found, what))


def test_the_serial_mode_is_not(audited: Any) -> None:
    found = audited(mode="serial")
    assert failed(found) == {NODES, SAVED}
    for what in (NODES, SAVED):
        assert len(offenders(found, what)) > 10
        assert all(name.startswith("unet.") for name in offenders(found, what))


@pytest.mark.parametrize("save", [save_sdxl, save_sd3])
def test_models_with_several_text_encoders_are_proven_and_their_serial_models_are_not(
    audited: Any, tmp_path: Path, save: Any
) -> None:
    own = {"pipeline": save(tmp_path / "pipeline"), "text_encoder_name_or_path": None, "max_text_tokens": None}
    deep = audited(**own, **DEEP)
    assert failed(deep) == set()
    blocks = "spatial.up_blocks" if save is save_sdxl else "spatial.transformer_blocks"
    behind = {name for name in deep.nodes if name.startswith("spatial.")}
    assert behind
    assert all(name.startswith(blocks) for name in behind)
    serial = audited(**own, mode="serial")
    assert failed(serial) == {NODES, SAVED}
    assert len(offenders(serial, NODES)) > 10


def test_serial_layers_recomputed_are_in_the_graph_all_the_same(audited: Any) -> None:
    assert NODES in failed(audited(mode="serial", gradient_checkpointing=True))


def test_the_full_mode_trains_the_spatial_branch(audited: Any) -> None:
    assert failed(audited(mode="full")) == {NODES, SAVED, LEAVES, HASH}


def test_one_step_is_too_few_for_a_new_ring(audited: Any) -> None:
    # The fusion starts as the identity on h, so at first nothing reaches the layers behind it.
    found = audited(steps=1)
    assert failed(found) == {NONZERO.format(1)}
    assert all(name.startswith("ring.") for name in offenders(found, NONZERO.format(1)))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_spatial_branch_with_a_graph_of_its_own_is_found(
    audited: Any, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """The graph is cut in front of the ring, so it is no part of the backward pass, but it costs memory."""

    build = auditing.build_task

    def with_a_trained_layer(*args: Any) -> Any:
        task: Any = build(*args)
        task.parts.denoiser.spatial.conv_in.requires_grad_()
        return task

    def cut(features: Any) -> Any:
        return (tree_map_only(torch.Tensor, torch.Tensor.detach, feature) for feature in features)

    monkeypatch.setattr(auditing, "build_task", with_a_trained_layer)
    monkeypatch.setattr(parallel_model, "without_graph", cut)
    found = audited(frozen_ahead=ahead)
    assert failed(found) >= {NODES, SAVED}
    assert all(len(offenders(found, what)) > 10 for what in (NODES, SAVED))


def test_a_spatial_weight_that_changes_is_seen(audited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = auditing.build_task

    def tampering(*args: Any) -> Any:
        task: Any = build(*args)
        loss = task.loss

        def changed(*args: Any) -> Any:
            with torch.no_grad():
                task.parts.denoiser.spatial.conv_in.weight.view(-1)[0] += 1
            return loss(*args)

        task.loss = changed
        return task

    monkeypatch.setattr(auditing, "build_task", tampering)
    assert failed(audited()) == {HASH}


def test_a_parameter_without_a_gradient_is_named(audited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = auditing.build_task

    def with_idle_parameter(*args: Any) -> Any:
        task: Any = build(*args)
        task.parts.denoiser.ring.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return task

    monkeypatch.setattr(auditing, "build_task", with_idle_parameter)
    found = audited()
    assert offenders(found, "every trained parameter gets a finite gradient") == ("ring.idle",)


def test_other_stages_are_refused(audited: Any) -> None:
    with pytest.raises(MobiusError, match="text-to-image"):
        audited(stage="text-to-image", data={"num_frames": 1})


def test_the_tool_shows_the_proof_and_writes_nothing(
    one_rank: None,
    tiny_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out", **SMALL))
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--config", str(path), "--top", "2"])
    monkeypatch.setattr(environment, "prepare", lambda: ALONE)
    runpy.run_path(str(TOOL))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["proven"] * 6
    assert lines[6].startswith("saved for the backward pass of one micro-batch")
    assert len(lines) == 6 + 1 + 2 + 1
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_the_tool_exits_1_where_nothing_is_proven(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out", **SMALL))
    result = python(TOOL, "--config", path, "--json", "mode=serial", HF_HUB_OFFLINE="1")
    report = json.loads(result.stdout)
    assert (result.returncode, report["proven"]) == (1, False)
    assert report["saved_bytes"]["total"] == sum(report["saved_bytes"]["by_module"].values())
    assert "unet.down_blocks.0" in result.stderr
