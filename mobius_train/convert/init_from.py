"""Starting a new run from the trained weights of another run: its checkpoint, or its finished model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from mobius_train.models.families import is_video_model
from mobius_train.models.motion_weights import MOTION, read_motion
from mobius_train.models.parallel_model import ParallelModel
from mobius_train.recipe_files import validated
from mobius_train.ring_shape import RingShape

HALF = (torch.bfloat16, torch.float16)
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
                " Name final/ or checkpoint-<n> of a run, or the run's folder for its latest checkpoint. To resume a"
                " run whose source is gone, set init_from=null: weight_change is then measured from new weights"
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
        if isinstance(denoiser, ParallelModel):
            # A recipe that continues a video model may leave these fields out. Then the parameters decide.
            fits = checkpoint.state.contents.trained == {n: list(p.shape) for n, p in _trained(denoiser).items()}
            if before.ring_fields() or not fits:
                _check_ring(str(folder), RingShape(**before.ring_fields()), denoiser.ring_shape)
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
        if is_video_model(model) and type(model) is not type(denoiser):
            raise MobiusError(
                f"init_from={source} is a {type(model).__name__}, but this run trains a {type(denoiser).__name__}:"
                f" {REMEDY}"
            )
        if isinstance(model, ParallelModel) and isinstance(denoiser, ParallelModel):
            _check_ring(str(source), model.ring_shape, denoiser.ring_shape)
        other = build_denoiser(model, config.stage, config.mode)
        if found := _first_difference(dict(_frozen(other)), dict(_frozen(denoiser))):
            raise MobiusError(
                f"init_from={source} has another backbone than this run ({config.pretrained_model_name_or_path}):"
                f" {found}. {REMEDY.capitalize()}"
            )
        trained = _trained(other)
        self.description = f"weights of {source}" + (
            ", which are rounded to 16 bits: a checkpoint of its run has them in float32"
            if _is_rounded(trained)
            else ", float32"
        )
        return Weights({name: p.to("meta") for name, p in trained.items()}, lambda: iter(trained.items()))


def _check_ring(where: str, was: RingShape, now: RingShape) -> None:
    if was.different(asdict(now)):
        raise MobiusError(f"init_from={where} has a ring with {was}, but this run has {now}: {REMEDY}")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _trained(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    return {name: p for name, p in denoiser.trained.named_parameters() if p.requires_grad}


def _is_rounded(weights: Mapping[str, Tensor]) -> bool:
    """All are numbers of bfloat16, or of float16."""
    return any(all(torch.equal(p.float(), p.to(dtype).float()) for p in weights.values()) for dtype in HALF)


def _equal_when_rounded(one: Tensor, other: Tensor) -> bool:
    """They are equal, or one of them is the other one in 16 bits."""
    pairs = ((one, other), (other, one))
    return torch.equal(one, other) or any(torch.equal(a, b.to(dtype).float()) for a, b in pairs for dtype in HALF)


def _frozen(denoiser: Denoiser) -> Iterator[tuple[str, Tensor]]:
    """The weights that are not trained, of which a serial model has some inside the trained module."""
    beside = [] if denoiser.frozen is None else denoiser.frozen.named_parameters(prefix="frozen")
    inside = ((name, p) for name, p in denoiser.trained.named_parameters() if not p.requires_grad)
    return chain(beside, inside)


def _first_difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """The first weight that differs by more than the rounding of either; empty if there is none."""
    both_rounded = _is_rounded(theirs) and _is_rounded(ours)
    for name in theirs | ours:
        if name not in theirs or name not in ours:
            return f"{name} is only in {'this run' if name in ours else 'init_from'}"
        their, our = theirs[name].detach(), ours[name].detach()
        if their.shape != our.shape:
            return f"{name} is {tuple(their.shape)}, this run's is {tuple(our.shape)}"
        their, our = their.to(our.device).float(), our.float()
        # Rounded to two types they are near each other: bfloat16 has 8 bits, and float16 ends at 6e-8.
        near = both_rounded and torch.allclose(their, our, rtol=2**-7, atol=1e-7)
        if not (near or _equal_when_rounded(their, our)):
            return f"{name} has other values"
    return ""
