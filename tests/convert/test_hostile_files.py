"""A pickle that would run a command: refused by name, and the command never runs."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hostile_pickle import Command

from mobius_train.convert.consolidate import consolidate_checkpoint
from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.serial_parallel import serial_to_parallel
from mobius_train.convert.single_file import from_single_file
from mobius_train.errors import MobiusError


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the-command-ran"


def test_the_command_is_real(tmp_path: Path, marker: Path) -> None:
    torch.save({"state": Command(marker)}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.distributed
@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize(
    "name", ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], ids=["optimizer", "model"]
)
def test_deepspeed(sharded: Path, tmp_path: Path, marker: Path, name: str, protocol: str) -> None:
    shutil.copytree(sharded / "zero2", tmp_path / "copy")
    path = tmp_path / "copy" / "global_step1" / name
    content = {"optimizer_state_dict": {"zero_stage": Command(marker)}, "module": {}}
    if protocol == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(MobiusError, match=name):
        consolidate_checkpoint(tmp_path / "copy", tmp_path / "whole.safetensors")
    assert not marker.exists()


@pytest.mark.distributed
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_fsdp(sharded: Path, tmp_path: Path, marker: Path, name: str) -> None:
    shutil.copytree(sharded / "fsdp", tmp_path / "copy")
    path = tmp_path / "copy" / name
    size = path.stat().st_size
    if name == ".metadata":
        path.write_bytes(pickle.dumps({"state_dict_metadata": Command(marker)}))
    else:
        path.write_bytes(pickle.dumps(Command(marker)).ljust(size, b"\0"))
    with pytest.raises(MobiusError, match=name.replace(".", r"\.")):
        consolidate_checkpoint(tmp_path / "copy", tmp_path / "whole.safetensors")
    assert not marker.exists()
    assert not list(tmp_path.glob("*whole*"))


@pytest.mark.distributed
def test_fsdp_metadata_stays_in_its_folder_and_makes_no_other_types(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded / "fsdp", tmp_path / "copy")
    path = tmp_path / "copy" / ".metadata"
    honest = path.read_bytes()
    found = pickle.loads(honest)
    for info in found.storage_data.values():
        info.relative_path = "../copy/__0_0.distcp"
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(MobiusError, match=r"\.metadata.*'\.\./copy"):
        consolidate_checkpoint(tmp_path / "copy", tmp_path / "whole.safetensors")
    path.write_bytes(pickle.dumps(pickle.loads(honest).planner_data))
    with pytest.raises(MobiusError, match=r"\.metadata"):
        consolidate_checkpoint(tmp_path / "copy", tmp_path / "whole.safetensors")
    path.write_bytes(honest[: len(honest) // 2])
    with pytest.raises(MobiusError, match=r"\.metadata"):
        consolidate_checkpoint(tmp_path / "copy", tmp_path / "whole.safetensors")


@pytest.mark.parametrize("name", ["file.ckpt", "file.safetensors"])
def test_single_file(stable_diffusion: dict[str, Path], tmp_path: Path, marker: Path, name: str) -> None:
    torch.save({"state_dict": {"callbacks": Command(marker)}}, tmp_path / name)
    with pytest.raises(MobiusError, match=name):
        from_single_file(tmp_path / name, stable_diffusion["small"], tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_model_folder(stable_diffusion: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    folder = tmp_path / "copy" / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Command(marker)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(MobiusError, match=r"diffusion_pytorch_model\.bin"):
        from_image_model(tmp_path / "copy", tmp_path / "out", "parallel")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_cut_weights_are_named(stable_diffusion: dict[str, Path], tmp_path: Path, part: str, kept: float) -> None:
    shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    path = tmp_path / "copy" / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(MobiusError, match=f"{part}/diffusion_pytorch_model.safetensors"):
        from_image_model(tmp_path / "copy", tmp_path / "out", "parallel")
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else_are_refused(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"UNet2DConditionModel.*SerialUNet"):
        serial_to_parallel(stable_diffusion["small"], tmp_path / "out")
    with pytest.raises(MobiusError, match=r"no/config\.json"):
        serial_to_parallel(tmp_path / "no", tmp_path / "out")
