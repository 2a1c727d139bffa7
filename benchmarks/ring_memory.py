"""Bytes saved for the backward pass and FLOPs for each memory option of the ring, at the paper's size.

    python benchmarks/ring_memory.py --record benchmarks/ring_memory.json

Stable Diffusion 2.1, batch 2, 8 frames, 256 px (32x32 latents), 77 text tokens. The real model runs on fake tensors,
with shapes but without values, so a laptop is enough. Bytes are exact for eager execution and exclude parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mobius_train.assembly.known_models import KNOWN
from mobius_train.files import replace_file
from mobius_train.job.versions import versions
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.models.recompute import LayerMemory

EAGER = {
    "all kept": LayerMemory(),
    "recompute_activations": LayerMemory(recompute_activations=True),
    "gradient_checkpointing, kept 0.75": LayerMemory(True, 0.75),
    "gradient_checkpointing, kept 0.75, recompute_activations": LayerMemory(True, 0.75, True),
    "gradient_checkpointing, kept 0.5": LayerMemory(True, 0.5),
    "gradient_checkpointing, kept 0.5, recompute_activations": LayerMemory(True, 0.5, True),
    "gradient_checkpointing, kept 0.25": LayerMemory(True, 0.25),
    "gradient_checkpointing, offload 0.2": LayerMemory(True, activation_offload=0.2),
    "gradient_checkpointing": LayerMemory(True),
    "activation_offload 0.2": LayerMemory(activation_offload=0.2),
    "activation_offload 0.5": LayerMemory(activation_offload=0.5),
}


@dataclass(frozen=True)
class Row:
    """MiB saved on the device and in host memory for the backward pass; TFLOP of a forward and a backward pass."""

    option: str
    saved_mib: float
    host_mib: float
    tflop: float


def eager(option: str, model: Any, predict: Callable[[], Tensor]) -> Row:
    """Measure one step."""
    with FlopCounterMode(display=False) as flops:
        output, saved = saved_for_backward(predict, {"model": model})
        # With fake tensors, host memory and device memory are the same.
        host = getattr(getattr(model, "ring", None), "host_bytes", 0)
        output.float().sum().backward()
    model.zero_grad()
    return Row(option, (saved.total - host) / 2**20, host / 2**20, flops.get_total_flops() / 1e12)


def unet2d(dtype: torch.dtype) -> UNet2DConditionModel:
    torch.set_default_dtype(dtype)
    return UNet2DConditionModel(**KNOWN["stable-diffusion-2-1"]["unet"]).eval()


def steps(model: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The forward pass of a step."""

    def predict() -> Tensor:
        sample, text = torch.randn(2, 4, 8, 32, 32, dtype=dtype), torch.randn(2, 77, 1024, dtype=dtype)
        return model.predict(sample, torch.tensor([3, 700]), text)

    return predict


def measure(dtype: torch.dtype) -> Iterator[Row]:
    """All eager options with the ring in `dtype`."""
    for recompute in (False, True):
        unet = unet2d(dtype).requires_grad_(False)
        serial = SerialUNet.from_unet2d(unet)
        serial.gradient_checkpointing = recompute
        option = f"mode serial{', gradient_checkpointing' if recompute else ''}"
        yield eager(option, serial, steps(serial, dtype))
    model = ParallelUNet.from_unet2d(unet2d(dtype))
    for option, memory in EAGER.items():
        model.ring.set_memory(memory)
        yield eager(option, model, steps(model, dtype))
    if dtype == torch.float32:
        spatial = unet2d(torch.bfloat16)
        torch.set_default_dtype(dtype)
        model = ParallelUNet.from_unet2d(spatial)
        model.set_memory(LayerMemory(True))
        yield eager("gradient_checkpointing, frozen_dtype bf16", model, steps(model, dtype))


def shown(name: str, rows: Iterator[Row]) -> list[dict[str, Any]]:
    """Print each row in Markdown as soon as it is measured."""
    print(f"\n{name}\n\n| option | saved, MiB | in host memory, MiB | TFLOP |\n|---|---|---|---|", flush=True)
    results = []
    for r in rows:
        print(f"| {r.option} | {r.saved_mib:.0f} | {r.host_mib:.0f} | {r.tflop:.2f} |", flush=True)
        results.append(asdict(r))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    with FakeTensorMode():
        results = {
            "fp32": shown("fp32", measure(torch.float32)),
            "bf16": shown("bf16", measure(torch.bfloat16)),
        }
    if arguments.record:
        workload = "Stable Diffusion 2.1, batch 2, 8 frames, 32x32 latents, 77 tokens; fake tensors on a CPU"
        record = {"workload": workload, "versions": versions(), "results": results}
        replace_file(arguments.record, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
