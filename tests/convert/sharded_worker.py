"""Started on two ranks by conftest.py: writes checkpoints as stock DeepSpeed and FSDP trainings do.

sharded_worker.py <folder>

<folder>/zero1, zero2 and zero3 are DeepSpeed's; <folder>/fsdp is torch.distributed.checkpoint's, and fsdp.pt the
whole weights that it must hold.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mobius_train.cli import run_rank

deepspeed.ops.__compatible_ops__ = {}
# The float32 weights must be large beside what Python itself needs, since memory is measured.
WIDTH, LAYERS = 768, 24


class Model(nn.Module):
    """Odd sizes, two parameter groups, tied, frozen and buffers: all that a checkpoint of ZeRO has a place for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.small, self.tied = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
        self.tied.weight = self.small.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("offset", torch.full((3,), 0.1))
        self.register_buffer("index", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.frozen(self.small(x) + self.tied(x)) + self.offset.to(x.dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for name, p in trained if name.endswith("weight")]
    return [
        {"params": weights, "weight_decay": 0.1},
        {"params": [p for name, p in trained if name.endswith("bias")], "weight_decay": 0.0},
    ]


def zero(stage: int, bf16: bool, folder: Path) -> None:
    torch.manual_seed(stage)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    engine.backward(engine(torch.randn(2, 7).to(dtype)).float().square().mean())
    engine.step()
    engine.save_checkpoint(str(folder), tag="global_step1", client_state={"epoch": 3})


def fsdp(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(2, 7)).square().mean().backward()
    optimizer.step()
    weights, state = cast(tuple[dict[str, DTensor], Any], get_state_dict(model, optimizer))
    # Spelled as an average, to have a second entry with weights.
    average = {name: tensor * 0.5 for name, tensor in weights.items()}
    dcp.save({"model": weights, "ema": average, "optim": state, "step": 4}, checkpoint_id=folder)
    whole = {name: tensor.full_tensor() for name, tensor in weights.items()}
    if dist.get_rank() == 0:
        torch.save(whole, folder.with_suffix(".pt"))


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    zero(1, False, folder / "zero1")
    zero(2, True, folder / "zero2")
    zero(3, True, folder / "zero3")
    fsdp(folder / "fsdp")
    dist.barrier()


if __name__ == "__main__":
    run_rank(main)
