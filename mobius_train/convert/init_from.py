"""Starting a new run from the trained weights of another run: its checkpoint, or its finished model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.assembly.parts import frozen_hash_in
from mobius_train.assembly.weights import Pretrained
from mobius_train.checkpoint.read import Checkpoint, open_checkpoint
from mobius_train.config import RunConfig
from mobius_train.convert.lazy_weights import Weights
from mobius_train.convert.run_checkpoint import EMA, MODEL, find_run_checkpoint, weights_of
from mobius_train.convert.trained_weights import assign_weights
from mobius_train.dtypes import Dtypes
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser, build_denoiser, weights_hash
from mobius_train.models.motion_weights import MOTION, read_motion
from mobius_train.recipe_files import validated
from mobius_train.ring_shape import RingShape

REMEDY = "set the same values, or remove init_from"


class InitFrom(Pretrained):
    """The pretrained models of a recipe, with the trained weights of its `init_from`.

    A checkpoint has them in float32; of a run with use_ema they are the moving average, as in its final/. Motion
    weights have them in float16.

    Args:
        config: a recipe with init_from.

    Raises:
        MobiusError: the folder is neither a checkpoint, nor a run with one, nor a model, nor motion weights; or the
            checkpoint is damaged.

    Attributes:
        description: what the weights are, for the person who starts the run; known after `fill`.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.init_from is not None
        self._config, self._source = config, config.init_from
        folder = find_run_checkpoint(self._source)
        self._checkpoint = None if folder is None else open_checkpoint(folder)
        self.description = ""
        of_models = ("model_index.json", "config.json", MOTION)
        if folder is None and not any((self._source / name).is_file() for name in of_models):
            raise MobiusError(
                f"init_from={self._source}: there is no final/, checkpoint, run with a checkpoint, or motion weights."
                " Name final/ or checkpoint-<n> of a run, or the run's folder for its latest checkpoint"
            )

    def fill(self, denoiser: Denoiser) -> None:
        """
        Raises:
            MobiusError: the weights are those of another model; the message names what differs.
        """
        weights = self._of_model(denoiser) if self._checkpoint is None else self._of(self._checkpoint, denoiser)
        assign_weights(denoiser.trained, weights)

    def _of(self, checkpoint: Checkpoint, denoiser: Denoiser) -> Weights:
        config, folder = self._config, checkpoint.folder
        before = validated(RunConfig, checkpoint.config, f"the recipe in {folder}")
        for name in ("stage", "mode"):
            if getattr(before, name) != getattr(config, name):
                raise MobiusError(
                    f"init_from={folder} was trained with {name}={getattr(before, name)}, but this run has"
                    f" {name}={getattr(config, name)}: {REMEDY}"
                )
        if config.mode == "parallel" and config.stage == "text-to-video":
            _check_ring(str(folder), RingShape(**before.ring_fields()), RingShape(**config.ring_fields()))
        if checkpoint.state.frozen_sha256 != self._frozen_hash(denoiser, Dtypes.of(before).frozen):
            raise MobiusError(
                f"init_from={folder} was trained with another backbone ({checkpoint.state.frozen_source}) than this run"
                f" has ({config.pretrained_model_name_or_path}): {REMEDY}"
            )
        averaged = checkpoint.state.contents.use_ema
        kind = "moving average" if averaged else "weights"
        self.description = f"{kind} of step {checkpoint.state.progress['step']} in {folder}, float32"
        return weights_of(checkpoint, EMA if averaged else MODEL)

    def _frozen_hash(self, denoiser: Denoiser, dtype: torch.dtype) -> str:
        if denoiser.frozen is None:
            return ""
        if _dtype(denoiser.frozen) in (dtype, torch.float32):
            return weights_hash(denoiser.frozen, dtype)
        # They are rounded to another type already.
        return frozen_hash_in(self._config, dtype)

    def _of_model(self, denoiser: Denoiser) -> Weights:
        source, config = self._source, self._config
        assert config.stage != "autoencoder"
        model: Any
        if (source / MOTION).is_file():
            model, _ = read_motion(source)
        else:
            model = load_image_or_video_model(None, str(source))
        if hasattr(model, "ring_shape") and hasattr(denoiser, "ring_shape"):
            _check_ring(str(source), model.ring_shape, denoiser.ring_shape)
        other = build_denoiser(model, config.stage, config.mode)
        if found := _first_difference(dict(_frozen(other)), dict(_frozen(denoiser))):
            raise MobiusError(
                f"init_from={source} has another backbone than this run ({config.pretrained_model_name_or_path}):"
                f" {found}. {REMEDY.capitalize()}"
            )
        trained = {name: p for name, p in other.trained.named_parameters() if p.requires_grad}
        rounded = any(
            all(torch.equal(p, p.to(dtype).float()) for p in trained.values())
            for dtype in (torch.bfloat16, torch.float16)
        )
        self.description = f"weights of {source}" + (
            ", which are rounded to 16 bits: a checkpoint of its run has them in float32" if rounded else ", float32"
        )
        return Weights({name: p.to("meta") for name, p in trained.items()}, lambda: iter(trained.items()))


def _check_ring(where: str, was: RingShape, now: RingShape) -> None:
    if was.different(asdict(now)):
        raise MobiusError(f"init_from={where} has a ring with {was}, but this run has {now}: {REMEDY}")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _frozen(denoiser: Denoiser) -> Iterator[tuple[str, Tensor]]:
    """The weights that are not trained, of which a serial model has some inside the trained module."""
    beside = [] if denoiser.frozen is None else denoiser.frozen.named_parameters(prefix="frozen")
    inside = ((name, p) for name, p in denoiser.trained.named_parameters() if not p.requires_grad)
    return chain(beside, inside)


def _first_difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """The first weight that differs by more than the rounding of either; empty if there is none."""
    for name in theirs | ours:
        if name not in theirs or name not in ours:
            return f"{name} is only in {'this run' if name in ours else 'init_from'}"
        their, our = theirs[name].detach(), ours[name].detach()
        if their.shape != our.shape:
            return f"{name} is {tuple(their.shape)}, this run's is {tuple(our.shape)}"
        # One of them may have been rounded to bfloat16, of 8 bits, or to float16, which ends at 6e-8.
        if not torch.allclose(their.to(our.device).float(), our.float(), rtol=2**-7, atol=1e-7):
            return f"{name} has other values"
    return ""
