from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from launching import REPOSITORY, python
from made_checkpoints import SHAPES, make
from tiny import save_pipeline

from mobius_train.checkpoint.inspect import inspect
from mobius_train.errors import MobiusError


def test_a_checkpoint_and_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    make(tmp_path, 2)
    report = inspect(folder)
    assert (report["kind"], report["step"], report["ranks"], report["problems"]) == ("checkpoint", 4, 2, [])
    weights = {"name": "weights", "bytes": 4 * (15 + 7), "tensors": SHAPES}
    assert report["parts"][0]["name"] == "average"
    assert weights in report["parts"]
    run = inspect(tmp_path)
    assert (run["kind"], run["step"], run["latest"]) == ("run", 4, "checkpoint-2")
    assert [inside["step"] for inside in run["folders"]] == [2, 4]


@pytest.mark.distributed
def test_damage_is_told_and_exits_1(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    (folder / "state.json").write_text("{}")
    result = python("tools/inspect_checkpoint.py", tmp_path, "--json")
    assert result.returncode == 1
    assert "state.json" in result.stderr
    assert json.loads(result.stdout)["folders"][0]["problems"]


@pytest.mark.distributed
def test_motion_weights_are_known_and_a_folder_of_no_kind_exits_1(tmp_path: Path) -> None:
    motion = python("tools/inspect_checkpoint.py", REPOSITORY / "assets" / "emoji-motion", "--json")
    assert motion.returncode == 0, motion.stderr
    report = json.loads(motion.stdout)
    assert (report["kind"], report["model"]) == ("motion weights", "ParallelUNet")
    assert report["base"] == "./../emoji-backbone"
    shutil.copyfile(REPOSITORY / "assets" / "emoji-motion" / "README.md", tmp_path / "motion.safetensors")
    damaged = python("tools/inspect_checkpoint.py", tmp_path)
    assert damaged.returncode == 1
    assert "damaged" in damaged.stderr
    (tmp_path / "motion.safetensors").unlink()
    unknown = python("tools/inspect_checkpoint.py", tmp_path)
    assert unknown.returncode == 1
    assert "known kind" in unknown.stderr


def test_folders_of_others(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    pipeline = inspect(tmp_path / "pipeline")
    assert (pipeline["kind"], pipeline["class"]) == ("diffusers pipeline", "StableDiffusionPipeline")
    assert any(
        part["name"].startswith("unet/") and "conv_in.weight" in part.get("tensors", {}) for part in pipeline["parts"]
    )
    model = inspect(tmp_path / "pipeline" / "unet")
    assert (model["kind"], model["class"]) == ("diffusers model", "UNet2DConditionModel")
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "global_step7" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps("not opened"))
    deepspeed = inspect(tmp_path / "global_step7")
    assert (deepspeed["kind"], deepspeed["step"]) == ("DeepSpeed checkpoint", 7)
    (tmp_path / "pipeline" / "model_index.json").unlink()
    backbone = inspect(tmp_path / "pipeline")
    assert backbone["kind"] == "folder of diffusers models"
    assert [inside.get("class") for inside in backbone["folders"]] == [
        "DDPMScheduler",
        "UNet2DConditionModel",
        "AutoencoderKL",
    ]
    (tmp_path / "empty").mkdir()
    assert inspect(tmp_path / "empty")["kind"] == "unknown"
    with pytest.raises(MobiusError, match="absent"):
        inspect(tmp_path / "absent")


def test_broken_safetensors_of_others_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors" in inspect(tmp_path)["problems"][0]
