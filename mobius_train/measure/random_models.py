"""A recipe's task with random weights of full size and random clips: needs no hub, no checkpoint and no data set.

Memory and speed are those of the real thing; losses mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import BatchEncoding

from mobius_train.assembly.build import diffusion_task
from mobius_train.assembly.open_data import largest_shape
from mobius_train.assembly.options import check_device
from mobius_train.config import RunConfig
from mobius_train.data.buckets import Shape
from mobius_train.data.clips import Clip, ClipDataset
from mobius_train.diffusion.objective import DiffusionObjective
from mobius_train.encoders.text_encoder import TextEncoder
from mobius_train.job.distributed import Distributed
from mobius_train.plan.model_configs import find_configs
from mobius_train.plan.simulate import new_text_encoder, new_vae
from mobius_train.tasks.denoising import DiffusionTask

CLIPS = 64
# Stable Diffusion's, where the recipe leaves the schedule to the pretrained model.
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def random_task(config: RunConfig, recipe: Path, distributed: Distributed) -> DiffusionTask:
    """The task of a text-to-image or text-to-video recipe; the recipe's file says where to look for configurations.

    Raises:
        MobiusError: a model's configuration is nowhere to be found, or the device cannot do what the recipe wants.
    """
    check_device(config, distributed.device)
    configs = find_configs(config, recipe)
    assert configs.unet is not None
    assert configs.text_encoder is not None
    objective = DiffusionObjective(DDPMScheduler.from_config(config.scheduler_config or SCHEDULER), config.objective)
    torch.manual_seed(config.seed)
    # A billion random numbers take seconds on a GPU and a minute on a CPU.
    with distributed.device:
        unet = UNet2DConditionModel.from_config(configs.unet)
        vae, text_model = new_vae(configs.vae), new_text_encoder(configs.text_encoder)
        text = TextEncoder(text_model, RandomTokens(text_model.config), distributed.device, config.max_text_tokens)
        clips = RandomClips(largest_shape(config.data))
        heldout = None if config.data.validation is None else clips
        task = diffusion_task(config, unet, objective, vae, text, clips, heldout, distributed)
    # Where `build_task` leaves it: an engine that starts from float32 weights on the GPU would need room for them.
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

    def read(self, index: int, caption: int) -> Clip:
        shape = (self._shape.num_frames, 3, self._shape.height, self._shape.width)
        frames = torch.randint(256, shape, dtype=torch.uint8, device="cpu")
        return Clip(self.keys[index], "noise", frames)

    def captions(self, index: int) -> list[str]:
        return ["noise"]


class RandomTokens:
    """Stands for a tokenizer; whatever the caption, all tokens but the last are text."""

    is_fast = False

    def __init__(self, config: Any) -> None:
        self.model_max_length = int(config.max_position_embeddings)
        self._vocabulary = int(config.vocab_size)

    def __call__(self, caption: str, max_length: int, **_: Any) -> BatchEncoding:
        tokens = torch.randint(self._vocabulary, (1, max_length), device="cpu")
        mask = torch.ones(1, max_length, dtype=torch.long, device="cpu")
        mask[:, -1] = 0
        return BatchEncoding({"input_ids": tokens, "attention_mask": mask})
