"""Consolidation equals what the writers of the checkpoints say, in the memory of little more than the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from consolidation_memory import peak_over_output
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from mobius_train.convert.consolidate import consolidate_checkpoint
from mobius_train.convert.lazy_weights import Weights
from mobius_train.convert.safetensors_files import write_safetensors
from mobius_train.errors import MobiusError

pytestmark = pytest.mark.distributed
STAGES = ("zero1", "zero2", "zero3")


def of_deepspeed(folder: Path) -> dict[str, Tensor]:
    """DeepSpeed's own answer. It leaves frozen weights in the training's dtype; in its float32 files they are cast."""
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("stage", STAGES)
def test_equals_zero_to_fp32_tensor_for_tensor(sharded: Path, stage: str, tmp_path: Path) -> None:
    report = consolidate_checkpoint(sharded / stage, tmp_path / "whole.safetensors")
    expected = of_deepspeed(sharded / stage)
    written = load_file(tmp_path / "whole.safetensors")
    assert same(written, expected)
    assert {"tied.weight", "index", "layers.9.bias"} <= written.keys()
    assert not same(written, of_deepspeed(sharded / STAGES[(STAGES.index(stage) + 1) % 3]))
    frozen = [what for what, _ in report.left_out if what.startswith("frozen.")]
    assert bool(frozen) == (stage == "zero1") == ("frozen.weight" not in written)
    # The folder of the tag itself will do, and so will the tag.
    for source, tag in ((sharded / stage / "global_step1", None), (sharded / stage, "global_step1")):
        again = tmp_path / f"{tag}.safetensors"
        consolidate_checkpoint(source, again, tag=tag)
        assert again.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_the_float32_weights(sharded: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    consolidate_checkpoint(sharded / "zero3", tmp_path / "whole.safetensors", dtype)
    expected = of_deepspeed(sharded / "zero3")
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in expected.items()}
    assert same(load_file(tmp_path / "whole.safetensors"), expected)


def test_is_split_above_a_size(sharded: Path, tmp_path: Path) -> None:
    consolidate_checkpoint(sharded / "zero2", tmp_path / "whole.safetensors", max_shard_size="10MB")
    files = sorted(path.name for path in tmp_path.iterdir())
    index = json.loads((tmp_path / "whole.safetensors.index.json").read_text())
    assert files[0] == f"whole-00001-of-{len(files) - 1:05d}.safetensors"
    assert len(files) > 4
    assert max((tmp_path / name).stat().st_size for name in files[:-1]) < 11e6
    written: dict[str, Tensor] = {}
    for name in files[:-1]:
        shard = load_file(tmp_path / name)
        assert {index["weight_map"][tensor] for tensor in shard} == {name}
        written |= shard
    assert same(written, of_deepspeed(sharded / "zero2"))


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_peaks_at_no_more_than_twice_the_float32_weights(sharded: Path, stage: str, tmp_path: Path) -> None:
    ratio = peak_over_output(sharded / stage, tmp_path / "whole.safetensors")
    print(f"{stage}: peak {ratio:.2f} times the float32 weights")
    assert ratio <= 2


def test_fsdp(sharded: Path, tmp_path: Path) -> None:
    report = consolidate_checkpoint(sharded / "fsdp", tmp_path / "whole.safetensors")
    expected = torch.load(sharded / "fsdp.pt", weights_only=True)
    assert same(load_file(tmp_path / "whole.safetensors"), expected)
    assert {what.split()[0] for what, _ in report.left_out} == {"optim", "ema", "step"}
    consolidate_checkpoint(sharded / "fsdp", tmp_path / "ema.safetensors", weights="ema")
    assert same(load_file(tmp_path / "ema.safetensors"), {name: t * 0.5 for name, t in expected.items()})
    with pytest.raises(MobiusError, match=r"ema, model, optim, step.*'raw'"):
        consolidate_checkpoint(sharded / "fsdp", tmp_path / "raw.safetensors", weights="raw")


def test_a_write_that_went_wrong_is_found_out(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_flip_a_bit(weights: Weights, path: Path, *options: Any) -> list[Path]:
        files = write_safetensors(weights, path, *options)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return files

    monkeypatch.setattr("mobius_train.convert.consolidate.write_safetensors", write_and_flip_a_bit)
    with pytest.raises(MobiusError, match=r"the check failed(.|\n)* differs"):
        consolidate_checkpoint(sharded / "fsdp", tmp_path / "whole.safetensors")
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_no_checkpoint_and_writes_over_nothing(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, complaint in ((tmp_path / "empty", "empty"), (tmp_path / "no", "/no$")):
        with pytest.raises(MobiusError, match=complaint):
            consolidate_checkpoint(source, tmp_path / "whole.safetensors")
    with pytest.raises(MobiusError, match="'ema'"):
        consolidate_checkpoint(sharded / "zero2", tmp_path / "whole.safetensors", weights="ema")
    with pytest.raises(MobiusError, match="max_shard_size='big'"):
        consolidate_checkpoint(sharded / "zero2", tmp_path / "whole.safetensors", max_shard_size="big")
    assert not list(tmp_path.glob("*whole*"))
    (tmp_path / "whole.safetensors").write_text("mine")
    with pytest.raises(MobiusError, match=r"whole\.safetensors"):
        consolidate_checkpoint(sharded / "zero2", tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").read_text() == "mine"


@pytest.fixture
def small(sharded: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint whose files may be damaged."""
    shutil.copytree(sharded / "zero2", tmp_path / "copy", ignore=shutil.ignore_patterns("*.py"))
    return tmp_path / "copy"


RANK_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("name", [RANK_1, "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_file_cut_short_is_named(small: Path, name: str, kept: float) -> None:
    path = small / "global_step1" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(MobiusError, match=name):
        consolidate_checkpoint(small, small / "whole.safetensors")
    assert not list(small.glob("*whole*"))


def test_missing_and_foreign_files_are_named(small: Path, sharded: Path) -> None:
    tag = small / "global_step1"
    (tag / RANK_1).unlink()
    with pytest.raises(MobiusError, match=r"\b2 ranks.*optim_states.*\b1\b"):
        consolidate_checkpoint(small, small / "whole.safetensors")
    # Rank 1 of another stage's checkpoint.
    shutil.copy(sharded / "zero3" / "global_step1" / RANK_1, tag / RANK_1)
    with pytest.raises(MobiusError, match=r"global_step1\b.*Error"):
        consolidate_checkpoint(small, small / "whole.safetensors")
    (tag / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(MobiusError, match="model_states"):
        consolidate_checkpoint(small, small / "whole.safetensors")
    (small / "latest").write_text("../../somewhere")
    with pytest.raises(MobiusError, match=r"latest .*'\.\./\.\./somewhere'"):
        consolidate_checkpoint(small, small / "whole.safetensors")
