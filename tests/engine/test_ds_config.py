"""What a DeepSpeed JSON may say beside a recipe."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_settings import settings
from recipes import DS_CONFIGS

from mobius_train.engine.ds_config import LARGEST_BUCKET, read_ds_json, resolve, with_bucket_sizes
from mobius_train.errors import MobiusError

NAMES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SETTINGS = settings(micro_batch_size=2, gradient_accumulation_steps=3, mixed_precision="bf16", learning_rate=1e-4)


def autos(values: dict[str, Any]) -> list[str]:
    found = []
    for key, value in values.items():
        found += autos(value) if isinstance(value, dict) else [key] if value == "auto" else []
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_auto_of_the_shipped_files_is_resolved(name: str) -> None:
    ds_json = read_ds_json(DS_CONFIGS / f"{name}.json")
    before = copy.deepcopy(ds_json)
    config = with_bucket_sizes(resolve(ds_json, SETTINGS, 4), trained=1000)
    assert autos(before)
    assert autos(config) == []
    assert ds_json == before
    assert config["train_batch_size"] == 2 * 3 * 4
    assert config["gradient_clipping"] == 1.0
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert config["zero_optimization"]["stage"] == int(name[4])


def test_buckets_hold_what_is_trained_up_to_a_limit() -> None:
    resolved = resolve({"zero_optimization": {"stage": 2, "allgather_bucket_size": 77}}, SETTINGS, 1)
    small = with_bucket_sizes(resolved, trained=1000)["zero_optimization"]
    large = with_bucket_sizes(resolved, trained=10**9)["zero_optimization"]
    assert (small["reduce_bucket_size"], small["allgather_bucket_size"]) == (1000, 77)
    assert (large["reduce_bucket_size"], large["allgather_bucket_size"]) == (LARGEST_BUCKET, 77)


def test_an_empty_json_takes_everything_from_the_recipe() -> None:
    config = resolve({}, SETTINGS, 1)
    assert config["zero_optimization"]["stage"] == 0
    assert config["optimizer"]["type"] == "AdamW"


CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu is 4", "train_batch_size=2"]),
    ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "3"]),
    ({"train_batch_size": 8}, ["train_batch_size is 8", "x 1 rank(s)", "6"]),
    ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "max_grad_norm"]),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16.enabled and fp16.enabled", "mixed_precision=bf16"]),
    ({"bf16": {"enabled": False}}, ["bf16.enabled is False", "mixed_precision=bf16"]),
    ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow", "non-finite"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "lr_scheduler"]),
    ({"activation_checkpointing": {}}, ["activation_checkpointing", "gradient_checkpointing"]),
    ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "did you mean zero_optimization"]),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["overlap_com", "did you mean overlap_comm"]),
    ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
    ({"zero_optimization": {"stage": True}}, ["stage is True"]),
    ({"zero_optimization": 2}, ["zero_optimization is 2", "object"]),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ["zero_optimization.offload_param", "at stage 2", "use stage 3"],
    ),
    (
        {"zero_optimization": {"stage": 1, "stage3_prefetch_bucket_size": 5}},
        ["zero_optimization.stage3_prefetch_bucket_size", "at stage 1"],
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        ["zero_optimization.offload_optimizer", "at stage 0", "stage 1 or 2 or 3"],
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["device is 'nvme'"]),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm", "guard"]),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, ['overlap_comm is "auto"']),
    ({"optimizer": {"type": "Lamb"}}, ["optimizer.type is 'Lamb'", "AdamW"]),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "learning_rate"]),
    ({"optimizer": {"params": {"torch_adam": False}}}, ["torch_adam is False"]),
]


@pytest.mark.parametrize(("ds_json", "words"), CONTRADICTIONS, ids=[words[0] for _, words in CONTRADICTIONS])
def test_a_contradiction_is_refused_by_name(ds_json: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(MobiusError) as refused:
        resolve(ds_json, SETTINGS, 1)
    for word in words:
        assert word in str(refused.value)


def test_all_contradictions_are_told_at_once() -> None:
    ds_json = {"train_batch_size": 8, "gradient_clipping": 3, "scheduler": {}, "zero_optimization": {"stage": 9}}
    with pytest.raises(MobiusError) as refused:
        resolve(ds_json, SETTINGS, 1)
    assert str(refused.value).count("\n  - ") == 4


def test_what_agrees_with_the_recipe_is_accepted() -> None:
    ds_json = {
        "train_batch_size": 6,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    }
    assert resolve(ds_json, SETTINGS, 1)["train_batch_size"] == 6
    with pytest.raises(MobiusError, match=r"train_batch_size.*\b2 rank"):
        resolve(ds_json, SETTINGS, 2)
    with pytest.raises(MobiusError, match="gradient_clipping"):
        resolve(ds_json, replace(SETTINGS, max_grad_norm=0.0), 1)


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"missing\.json"):
        read_ds_json(tmp_path / "missing.json")
    for text, message in (("{", "JSON"), (json.dumps([1]), r"\blist\b")):
        path = tmp_path / "ds.json"
        path.write_text(text)
        with pytest.raises(MobiusError, match=message):
            read_ds_json(path)
