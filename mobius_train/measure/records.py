"""What was measured on GPUs: the records of benchmarks/ that hold a whole recipe and its peak."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.config import RunConfig
from mobius_train.plan.gpus import GPUS
from mobius_train.plan.planner import Layout

# Fields of a recipe that decide its memory, beside those of `data` below.
DECISIVE = (
    "stage",
    "mode",
    "mixed_precision",
    "frozen_dtype",
    "max_text_tokens",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kept",
    "recompute_activations",
    "activation_offload",
    "compile",
    "attention_backend",
    "optimizer",
    "use_ema",
    "shard_frozen",
)
DECISIVE_DATA = ("resolution", "num_frames", "buckets")


@dataclass(frozen=True)
class Measured:
    """The peak of a run on one GPU, in bytes, with the context.

    Attributes:
        gpu: its name in `GPUS`.
        settings: see `_settings`.
        engine: deepspeed or fsdp.
        zero: what the DeepSpeed JSON says of ZeRO.
    """

    gpu: str
    settings: dict[str, Any]
    engine: str
    zero: dict[str, Any]
    peak: int


def read_records(folder: Path) -> list[Measured]:
    """All that is found in a folder's JSON files."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = record.get("settings", record) if isinstance(record, dict) else {}
        for one in settings.values() if isinstance(settings, dict) else ():
            measured = _measured(one) if isinstance(one, dict) else None
            if measured is not None:
                found.append(measured)
    return found


def find_record(records: list[Measured], gpu: str, config: RunConfig, layout: Layout) -> Measured | None:
    """The measurement of the same run; they are all of one rank."""
    if layout.ranks != 1:
        return None
    zero = (layout.ds_json or {}).get("zero_optimization", {})
    wanted = (gpu, _settings(config.model_dump(mode="json")), layout.engine, zero)
    return next((one for one in records if (one.gpu, one.settings, one.engine, one.zero) == wanted), None)


def _measured(record: dict[str, Any]) -> Measured | None:
    measured, config = record.get("measured"), record.get("config")
    if not isinstance(measured, dict) or not isinstance(config, dict) or not measured.get("peak"):
        return None
    gpu = _gpu(str(measured["device"]))
    if gpu is None:
        return None
    zero = record.get("deepspeed", {}).get("zero_optimization", {})
    peak = measured["peak"] + (measured.get("outside") or 0)
    return Measured(gpu, _settings(config), str(record.get("engine")), zero, peak)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    data = config["data"]
    return (
        {key: config.get(key) for key in DECISIVE}
        | {key: data.get(key) for key in DECISIVE_DATA}
        | {"cached": data.get("cache_dir") is not None}
    )


def _gpu(device: str) -> str | None:
    """`NVIDIA A100-SXM4-80GB` is A100-80; a size that a device's name lacks is the only one that there is."""
    models = [name.rsplit("-", 1) for name in GPUS]
    found = [(model, size) for model, size in models if model.replace("-", " ") in device.replace("-", " ")]
    if len(found) > 1:
        found = [(model, size) for model, size in found if f"{size}GB" in device.replace(" ", "")]
    return "-".join(found[0]) if len(found) == 1 else None
