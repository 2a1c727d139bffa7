"""What each memory option of the ring saves for the backward pass, and what it costs in FLOPs, at the paper's size.

    python benchmarks/ring_memory.py --record benchmarks/ring_memory.json

Stable Diffusion 2.1, batch 2, 8 frames, 256 px (32x32 latents), 77 text tokens, on fake tensors: the real model runs,
with shapes and without values, so that a laptop is enough. Bytes are exact for eager execution; parameters do not
count. The compiler's are those of its partitioner, under which inductor may fuse more.
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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mobius_train.durable import replace_file
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.models.compiling import compile_layers
from mobius_train.models.recompute import RingMemory
from mobius_train.versions import versions

EAGER = {
    "all kept": RingMemory(),
    "recompute_activations": RingMemory(recompute_activations=True),
    "gradient_checkpointing, kept 0.75": RingMemory(True, 0.75),
    "gradient_checkpointing, kept 0.75, recompute_activations": RingMemory(True, 0.75, True),
    "gradient_checkpointing, kept 0.5": RingMemory(True, 0.5),
    "gradient_checkpointing, kept 0.5, recompute_activations": RingMemory(True, 0.5, True),
    "gradient_checkpointing, kept 0.25": RingMemory(True, 0.25),
    "gradient_checkpointing, offload 0.2": RingMemory(True, activation_offload=0.2),
    "gradient_checkpointing": RingMemory(True),
    "activation_offload 0.2": RingMemory(activation_offload=0.2),
    "activation_offload 0.5": RingMemory(activation_offload=0.5),
}
BUDGETS = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class Row:
    """MiB kept on the device and in host memory for the backward pass; TFLOP of a forward and a backward pass."""

    option: str
    saved_mib: float
    host_mib: float
    tflop: float


class Alive(TorchDispatchMode):
    """Follows the storages of all operators' results while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def nbytes(self, without: set[int]) -> int:
        """Bytes that still live."""
        return sum(n for key, (ref, n) in self._seen.items() if key not in without and not ref.expired())


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage()._cdata for p in module.parameters()}


def eager(option: str, model: Any, predict: Callable[[], Tensor]) -> Row:
    """Measure one step."""
    with Alive() as alive, FlopCounterMode(display=False) as flops:
        output = predict()
        host = getattr(getattr(model, "ring", None), "host_bytes", 0)
        saved = alive.nbytes(storages(model) | {output.untyped_storage()._cdata}) - host
        output.float().sum().backward()
    model.zero_grad()
    return Row(option, saved / 2**20, host / 2**20, flops.get_total_flops() / 1e12)


def compiled(option: str, model: Any, predict: Callable[[], Tensor]) -> Row:
    """The same of a model whose layers are compiled: under a dispatch mode, they would not be."""
    saved: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    predict().float().sum().backward()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        predict()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = predict()
    total = sum(nbytes for key, (_, nbytes) in saved.items() if key not in storages(model))
    with flops:
        output.float().sum().backward()
    model.zero_grad()
    return Row(option, total / 2**20, 0.0, flops.get_total_flops() / 1e12)


def unet2d(dtype: torch.dtype) -> UNet2DConditionModel:
    torch.set_default_dtype(dtype)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ).eval()


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
        serial = SerialUNet.from_unet2d(unet, gradient_checkpointing=recompute)
        option = f"mode serial{', gradient_checkpointing' if recompute else ''}"
        yield eager(option, serial, steps(serial, dtype))
    model = ParallelUNet.from_unet2d(unet2d(dtype))
    for option, memory in EAGER.items():
        model.ring.set_memory(memory)
        yield eager(option, model, steps(model, dtype))
    if dtype == torch.float32:
        spatial = unet2d(torch.bfloat16)
        torch.set_default_dtype(dtype)
        model = ParallelUNet.from_unet2d(spatial, gradient_checkpointing=True)
        yield eager("gradient_checkpointing, frozen_dtype bf16", model, steps(model, dtype))


def measure_compiled(dtype: torch.dtype) -> Iterator[Row]:
    """The compiler's budgets."""
    for budget in BUDGETS:
        torch._dynamo.reset()
        model = ParallelUNet.from_unet2d(unet2d(dtype))
        compile_layers(model.ring, budget, backend="aot_eager")
        yield compiled(f"compile, activation_memory_budget {budget}", model, steps(model, dtype))


def shown(name: str, rows: Iterator[Row]) -> list[dict[str, Any]]:
    """Print the rows as they come, in Markdown."""
    print(f"\n{name}\n\n| option | saved, MiB | in host memory, MiB | TFLOP |\n|---|---|---|---|", flush=True)
    results = []
    for r in rows:
        print(f"| {r.option} | {r.saved_mib:.0f} | {r.host_mib:.0f} | {r.tflop:.2f} |", flush=True)
        results.append(asdict(r))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiler, which takes minutes")
    parser.add_argument("--record", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    with FakeTensorMode():
        results = {
            "fp32": shown("fp32", measure(torch.float32)),
            "bf16": shown("bf16", measure(torch.bfloat16)),
        }
        if not arguments.no_compile:
            results["fp32, compiled"] = shown("fp32, compiled", measure_compiled(torch.float32))
    if arguments.record:
        workload = "Stable Diffusion 2.1, batch 2, 8 frames, 32x32 latents, 77 tokens; fake tensors on a CPU"
        record = {"workload": workload, "versions": versions(), "results": results}
        replace_file(arguments.record, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
