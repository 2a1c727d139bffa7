"""Cells of the fit table that a measurement stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes import DS_CONFIGS, REPOSITORY

from mobius_train.config import load
from mobius_train.engine.ds_config import read
from mobius_train.measure.records import find_record, read_records
from mobius_train.plan import Layout

PAPER = REPOSITORY / "configs" / "paper_sd21.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One measurement on an A100 of 80 GB, a setting that failed, and records of other things."""
    config = load(PAPER, ["mixed_precision=bf16", "output_dir=elsewhere"])
    measured = {"device": "NVIDIA A100-SXM4-80GB", "peak": 1000, "outside": 10}
    one = {"measured": measured, "config": config.model_dump(mode="json"), "engine": "deepspeed"}
    one["deepspeed"] = read(DS_CONFIGS / "zero2.json")
    record = {"what": "memory", "settings": {"parallel bf16": one, "serial": {"error": "out of memory"}}}
    (tmp_path / "gpu_memory.json").write_text(json.dumps(record))
    (tmp_path / "other.json").write_text(json.dumps({"settings": "three", "measured": 3}))
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


def test_a_measurement_is_found_by_what_decides_memory(folder: Path) -> None:
    records = read_records(folder)
    assert len(records) == 1
    layout = Layout(1, ds_json=read(DS_CONFIGS / "zero2.json"))
    same = load(PAPER, ["mixed_precision=bf16", "global_batch_size=null", "learning_rate=1"])
    found = find_record(records, "A100-80", same, layout)
    assert found is not None
    assert found.peak == 1010
    assert find_record(records, "A100-40", same, layout) is None
    assert find_record(records, "A100-80", load(PAPER), layout) is None
    assert find_record(records, "A100-80", same.model_copy(update={"optimizer": "adamw_8bit"}), layout) is None
    assert find_record(records, "A100-80", same, Layout(4, ds_json=layout.ds_json)) is None
    assert find_record(records, "A100-80", same, Layout(1, "fsdp")) is None
    assert find_record(records, "A100-80", same, Layout(1, ds_json=read(DS_CONFIGS / "zero3.json"))) is None


def test_the_repositorys_own_records_of_memory_are_read_and_no_others() -> None:
    folder = REPOSITORY / "benchmarks"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    assert records
    of_memory = [
        record for record in records if isinstance(record, dict) and str(record.get("what")).startswith("memory")
    ]
    assert bool(read_records(folder)) == bool(of_memory)
