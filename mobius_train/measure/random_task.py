"""A recipe's task with random weights of full size and random clips, without hub, checkpoint or data set.

Memory and speed equal those of the real task; losses are meaningless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from mobius_train.assembly.model_configs import find_configs
from mobius_train.assembly.open_data import largest_shape
from mobius_train.assembly.parts import parts_of
from mobius_train.assembly.weights import Random
from mobius_train.config import RunConfig
from mobius_train.data.buckets import Shape
from mobius_train.data.clips import Clip, ClipDataset
from mobius_train.job.distributed import Distributed
from mobius_train.models import Denoiser
from mobius_train.tasks.denoising import DiffusionTask

CLIPS = 64


def random_task(
    config: RunConfig,
    recipe: Path,
    distributed: Distributed,
    instead: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> DiffusionTask:
    """Build the task of a text-to-image or text-to-video recipe; for `recipe` see `find_configs`.

    Args:
        instead: returns the denoiser to train instead of the recipe's.

    Raises:
        MobiusError: a model's configuration was not found, or the device does not support an option.
    """
    weights = Random(find_configs(config, recipe), distributed.device)
    parts = parts_of(config, weights, distributed.device)
    parts = replace(parts, denoiser=instead(parts.denoiser))
    if distributed.is_main:
        print(*parts.attention, sep="\n", flush=True)
    clips = RandomClips(largest_shape(config.data))
    heldout = None if config.data.validation is None else clips
    task = DiffusionTask(parts, clips, heldout, distributed)
    # A run has the trained module on the CPU here; float32 weights on the GPU would need extra memory in the engine.
    task.trained.to("cpu")
    return task


class RandomClips(ClipDataset):
    """Noise with captions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__([], num_frames=shape.num_frames, resolution=shape.width)
        self._shape = shape
        self.keys = [f"random-{index}" for index in range(CLIPS)]

    def __len__(self) -> int:
        return CLIPS

    def read(self, index: int, caption: int, place: Fraction | None = None) -> Clip:
        shape = (self._shape.num_frames, 3, self._shape.height, self._shape.width)
        frames = torch.randint(256, shape, dtype=torch.uint8, device="cpu")
        return Clip(self.keys[index], "noise", frames)

    def captions(self, index: int) -> list[str]:
        return ["noise"]
