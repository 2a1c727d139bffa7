"""Time the candidates for temporal attention: self-attention over few frames in a huge batch.

    python benchmarks/temporal_attention.py --record benchmarks/temporal_attention_cpu.json

A layer attends over F frames at each of N = clips x height x width positions. All candidates alternate in one run. The
results are ratios to sdpa: forward and backward, best of several rounds. The default in
mobius_train/models/choose_attention.py follows the committed records.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mobius_train.files import replace_file
from mobius_train.job.versions import versions
from mobius_train.models.attention import MAX_BATCH, eager, flash_attn, sdpa
from mobius_train.models.choose_attention import Machine, choose_attention

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
# (N, F, heads, head size): Stable Diffusion 2.1's levels at batch 2 and 256 px, more frames, the emoji backbone.
SHAPES = ((2048, 8, 5, 64), (512, 8, 10, 64), (128, 8, 20, 64), (2048, 16, 5, 64), (2048, 32, 5, 64), (1024, 8, 4, 16))
# One clip at 2048 px, timed only if that takes less than minutes.
HUGE = (65536, 8, 5, 64)


def plain_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula of SDPA in separate operators."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(query, key, value)


def in_pieces(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA on four parts of the batch, to measure the cost of splitting."""
    size = math.ceil(len(query) / 4)
    pieces = zip(*(x.split(size) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa(*piece) for piece in pieces])


def seconds(kernel: Kernel, inputs: list[Tensor]) -> float:
    """One forward and backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.ones_like(inputs[0])
    synchronize(inputs[0].device)
    start = time.perf_counter()
    kernel(*leaves).backward(gradient)
    synchronize(inputs[0].device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def candidates(machine: Machine, dtype: torch.dtype, head_dim: int) -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {"sdpa": sdpa, "sdpa in 4 pieces": in_pieces, "sdpa math": plain_sdpa, "eager": eager}
    if choose_attention("auto", machine, dtype, head_dim, temporal=True).backend == "flash_attn":
        kernels["flash_attn"] = flash_attn
    return kernels


def measure(device: torch.device, rounds: int, count: int) -> list[dict[str, Any]]:
    """Best seconds of every candidate, and ratios to sdpa, for each dtype and shape."""
    machine, results = Machine.of(device), []
    shapes = (*SHAPES[:count], HUGE) if device.type == "cuda" else SHAPES[:count]
    for dtype in (torch.float32, torch.bfloat16):
        for positions, frames, heads, size in shapes:
            inputs = [torch.randn(positions, frames, heads, size, device=device, dtype=dtype) for _ in range(3)]
            kernels = candidates(machine, dtype, size)
            if positions > MAX_BATCH:
                kernels = {name: kernel for name, kernel in kernels.items() if name in ("sdpa in 4 pieces", "eager")}
            best = dict.fromkeys(kernels, math.inf)
            for _ in range(rounds + 1):
                for name, kernel in kernels.items():
                    best[name] = min(best[name], seconds(kernel, inputs))
            first = next(iter(best.values()))
            ratios = {name: round(value / first, 3) for name, value in best.items()}
            shape = dict(
                zip(("positions", "frames", "heads", "head_dim"), (positions, frames, heads, size), strict=True)
            )
            results.append({"dtype": str(dtype), **shape, "seconds": best, "ratios": ratios})
            print(f"{dtype!s:15} {(positions, frames, heads, size)!s:20} {ratios}", flush=True)
    return results


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{model} ({', '.join(features)}), {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="number of shapes to time")
    parser.add_argument("--record", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(machine_name(device))
    record = {
        "machine": machine_name(device),
        "versions": versions(),
        "command": " ".join(sys.argv),
        "results": measure(device, arguments.rounds, arguments.shapes),
    }
    if arguments.record:
        replace_file(arguments.record, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
