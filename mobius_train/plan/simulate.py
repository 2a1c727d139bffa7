"""Simulation of a recipe's training step, encoders and sampling on fake tensors: shapes and storages without values.

The simulation runs the real model classes, so the bytes that operators save and copy are exact, not estimated.

Legend: B clips, C latent channels, F frames, h, w latent size, H, W pixels; L text tokens, D text width.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mobius_train.assembly.model_configs import ModelConfigs
from mobius_train.assembly.open_data import largest_shape
from mobius_train.assembly.options import store_frozen_weights
from mobius_train.assembly.parts import Parts, autoencoder_of, check_resolution, parts_of
from mobius_train.assembly.sharded import text_layers
from mobius_train.assembly.weights import Random
from mobius_train.conditions import Conditions
from mobius_train.config import RunConfig
from mobius_train.diffusion.process import NoisyBatch
from mobius_train.dtypes import Dtypes
from mobius_train.encoders.image_encoder import LatentSpace
from mobius_train.encoders.text_encoder import TextEncoder, Tokens, masks_padding
from mobius_train.errors import MobiusError
from mobius_train.models.denoiser import branch_of_modules
from mobius_train.models.parallel_model import ParallelModel
from mobius_train.models.units import layer_units
from mobius_train.plan.trace import Recorder, Trace, module_bytes
from mobius_train.sequence.group import Sent, SimulatedGroup
from mobius_train.tasks.autoencoder import Autoencoding, reconstruction_loss
from mobius_train.tasks.denoising import squared_error

META = torch.device("meta")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class FrozenModel:
    """Bytes of a frozen model, and of each layer that can be sharded."""

    whole: int = 0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Simulation:
    """Sizes of a recipe's models, and additional allocations of each phase.

    Attributes:
        trained: elements of each trained parameter.
        frozen_inside: elements of each frozen parameter inside the trained module (serial).
        units: shapes of the trained parameters of each unit in the step's trace, and last of those outside units.
        itemsize: bytes per element of the trained module in its compute dtype.
        frozen: the frozen branch outside the trained module.
        frozen_in_graph: a part of it also runs in the backward pass.
        vae, text: the autoencoder and the text encoders, in float32.
        step: one micro-batch forward and backward; its mark is `forward`.
        encoding: peak bytes of encoding one clip and its caption.
        sampling: peak bytes of sampling one clip, including decoding.
        heldout: peak bytes of the held-out loss of one batch; 0 without held-out data.
        ahead: peak bytes of the frozen branch of a micro-batch that is ahead; 0 without `frozen_ahead`.
        sent: to the ranks that share the clips, in `step` by the first of them; None if there are none.
    """

    trained: tuple[int, ...]
    frozen_inside: tuple[int, ...]
    units: tuple[tuple[Shape, ...], ...]
    itemsize: int
    frozen: FrozenModel
    vae: FrozenModel
    text: FrozenModel
    step: Trace
    encoding: int
    sampling: int
    heldout: int
    frozen_in_graph: bool = False
    ahead: int = 0
    sent: Sent | None = None


class Simulator:
    """Runs the phases of recipes on fake tensors.

    Recipes that differ only in the sizes of the data share one set of models.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._parts: dict[str, Parts] = {}

    def simulate(self, config: RunConfig, configs: ModelConfigs) -> Simulation:
        """Simulate one micro-batch, the encoders, the held-out loss and the sampling of a recipe.

        Raises:
            MobiusError: the models do not fit each other, or are not supported.
        """
        config = _as_simulated(config)
        # Hide diffusers' warnings about casts.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                if config.stage == "autoencoder":
                    return self._simulate_autoencoder(config, configs)
                parts = self._built(config, configs)
                check_resolution(config, parts.encoders.images.vae, parts.denoiser.image_model)
                with self._mode:
                    return _simulate_denoiser(config, parts)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise MobiusError(f"the recipe's models do not run together: {reason}") from error

    def _simulate_autoencoder(self, config: RunConfig, configs: ModelConfigs) -> Simulation:
        vae = autoencoder_of(config, Random(configs, META), META)
        space, dtype = LatentSpace.of(vae.config), Dtypes.of(config).trained
        in_float32, model = Autoencoding(copy.deepcopy(vae)), Autoencoding(vae.to(dtype))
        for module in (in_float32, model):
            make_fake(module, self._mode)
        shape = largest_shape(config.data)
        frames = 1 if config.data.random_frame else shape.num_frames
        clips = config.train_batch_size

        def loss(model: Autoencoding, dtype: torch.dtype) -> Tensor:
            pixels = torch.randn(clips, frames, 3, shape.height, shape.width, dtype=dtype)
            channels, _, *size = space.shape(frames, shape.height, shape.width)
            noise = torch.randn(clips * frames, channels, *size, dtype=dtype)
            output, mean, logvar = model(pixels.flatten(0, 1), noise)
            return reconstruction_loss(pixels, output, mean, logvar, config.objective.kl_weight).mean()

        with self._mode:
            evaluation = _without_graph(lambda: loss(in_float32, torch.float32))
            step = _forward_and_backward(Recorder(), model, layer_units(model), lambda: loss(model, dtype))
        return Simulation(
            trained=_elements(model, True),
            frozen_inside=(),
            units=_units(model, layer_units(model)),
            itemsize=dtype.itemsize,
            frozen=FrozenModel(),
            vae=FrozenModel(),
            text=FrozenModel(),
            step=step,
            encoding=0,
            sampling=evaluation,
            heldout=0 if config.data.validation is None else evaluation,
        )

    def _built(self, config: RunConfig, configs: ModelConfigs) -> Parts:
        # No model depends on these sizes.
        data = config.data.model_copy(update={"num_frames": 8, "resolution": 256, "buckets": None})
        key = config.model_copy(update={"data": data, "train_batch_size": 1}).model_dump_json()
        if key not in self._parts:
            parts = parts_of(config, Random(configs, META), META)
            # Engines cast the trained module in the same way.
            parts.denoiser.trained.to(parts.dtypes.trained)
            text = [encoder.model for encoder in parts.encoders.text.encoders.values()]
            for module in (parts.denoiser, parts.encoders.images.vae, *text):
                make_fake(cast(nn.Module, module), self._mode)
            with self._mode:
                store_frozen_weights(parts.denoiser, config)
            if config.sequence_parallel_size > 1:
                # The first rank has the larger shares.
                parts.denoiser.set_sequence(
                    SimulatedGroup(0, config.sequence_parallel_size, int(config.sequence_overlap))
                )
            self._parts[key] = parts
        return self._parts[key]


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a module on the meta device by fake CPU tensors, on which operators can run."""
    # Keeps the old tensors, since a tied weight is found again by its identity.
    made: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[tensor]

    with mode:
        for inner in module.modules():
            both: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
            for tensors in both:
                tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


def _as_simulated(config: RunConfig) -> RunConfig:
    """The recipe with settings that fake tensors support."""

    def half(dtype: str | None) -> str | None:
        # bf16 has the same size; some float16 CPU kernels have no fake implementation.
        return "bf16" if dtype == "fp16" else dtype

    return config.model_copy(
        update={
            # The compiler's choice of saved tensors is not simulated.
            "compile": False,
            "frozen_compile": False,
            "frozen_cuda_graphs": False,
            "mixed_precision": half(config.mixed_precision),
            "frozen_dtype": half(config.frozen_dtype),
            # flash-attn saves the same tensors as PyTorch's fused kernels.
            "attention_backend": "eager" if config.attention_backend == "eager" else "sdpa",
        }
    )


def _simulate_denoiser(config: RunConfig, parts: Parts) -> Simulation:
    denoiser, images, text = parts.denoiser, parts.encoders.images, parts.encoders.text
    shape = largest_shape(config.data)
    if config.stage == "text-to-image":
        shape = shape._replace(num_frames=1)
    # Sampling uses num_frames and resolution, independent of the buckets.
    sampled = 1 if config.stage == "text-to-image" else config.data.num_frames
    latent = images.space.shape(shape.num_frames, shape.height, shape.width)
    drawn = images.space.shape(sampled, config.data.resolution, config.data.resolution)

    @cache
    def predicting(batch: int, latent: tuple[int, ...]) -> int:
        # Often both phases take the same batch.
        return _without_graph(lambda: _predict(parts, batch, latent))

    batch, guided = config.train_batch_size, 2 if config.validation.guidance_scale > 1 else 1
    heldout = predicting(batch, latent) if config.data.validation is not None else 0
    sampling = 0
    if config.validation.prompts:
        sampling = max(
            predicting(guided, drawn), _without_graph(lambda: images.decode(torch.randn(1, *drawn), denoiser.sequence))
        )
    frames = (shape.num_frames, 3, shape.height, shape.width)
    group = denoiser.sequence
    before = None if group is None else group.sent
    step = _denoiser_step(parts, batch, latent)
    return Simulation(
        trained=_elements(denoiser.trained, True),
        frozen_inside=_elements(denoiser.trained, False),
        units=_units(denoiser.trained, denoiser.units()),
        itemsize=parts.dtypes.trained.itemsize,
        frozen=_frozen(denoiser.frozen, [] if denoiser.frozen is None else _flat(denoiser.backbone.units())),
        vae=_frozen(images.vae, []),
        text=_text(parts),
        step=step,
        encoding=max(
            _without_graph(lambda: images.posterior(torch.zeros(frames, dtype=torch.uint8), denoiser.sequence)),
            *(_without_graph(partial(_caption, encoder)) for encoder in text.encoders.values()),
        ),
        sampling=sampling,
        heldout=heldout,
        frozen_in_graph=bool(denoiser.frozen_in_graph()),
        ahead=_without_graph(lambda: _begin(parts, batch, latent)) if config.frozen_ahead else 0,
        sent=None if group is None or before is None else group.sent.since(before),
    )


def _denoiser_step(parts: Parts, batch: int, latent: tuple[int, ...]) -> Trace:
    recorder = Recorder()
    for module, branch in branch_of_modules(parts.denoiser).items():
        recorder.watch(module, branch)

    def loss() -> Tensor:
        target = torch.randn(batch, *latent)
        begun = parts.config.frozen_ahead
        prediction = _begin(parts, batch, latent)(None) if begun else _predict(parts, batch, latent)
        noisy = NoisyBatch(target, target, torch.zeros(batch), torch.ones(batch))
        return (squared_error(prediction, noisy) * noisy.weight).mean()

    return _forward_and_backward(recorder, parts.denoiser.trained, parts.denoiser.units(), loss)


def _forward_and_backward(
    recorder: Recorder, trained: nn.Module, units: list[list[nn.Module]], compute_loss: Callable[[], Tensor]
) -> Trace:
    recorder.watch_gradients(trained)
    for unit in units:
        recorder.watch_unit(unit)
    with recorder:
        loss = compute_loss()
        recorder.mark("forward")
        loss.backward()
        recorder.mark("backward")
    trace = recorder.trace()
    recorder.close()
    trained.zero_grad(set_to_none=True)
    return trace


def _predict(parts: Parts, batch: int, latent: tuple[int, ...]) -> Tensor:
    """Call the model as `DiffusionTask.loss` does."""
    return parts.denoiser.predict(*_model_input(parts, batch, latent))


def _begin(parts: Parts, batch: int, latent: tuple[int, ...]) -> Callable[[None], Tensor]:
    """Call the model as `DiffusionTask.begin` does."""
    return cast(ParallelModel, parts.denoiser).begin(*_model_input(parts, batch, latent), ahead=True)


def _model_input(parts: Parts, batch: int, latent: tuple[int, ...]) -> tuple[Tensor, Tensor, Conditions]:
    dtype, encoders = parts.dtypes.trained, parts.encoders
    caption = Conditions({name: torch.randn(shape) for name, shape in encoders.text.shapes().items()})
    height, width = (side * encoders.images.space.reduction for side in latent[-2:])
    size = Conditions.of_size(height, width, encoders.wanted)
    conditions = (caption | size).unsqueeze().repeat_frames(batch).to(dtype=dtype)
    sample, timesteps = torch.randn(batch, *latent), torch.zeros(batch, dtype=torch.long)
    return sample.to(dtype), timesteps, conditions


def _caption(encoder: TextEncoder) -> None:
    """Encode a caption with one of the text encoders, which run one after the other."""
    ones = torch.ones(1, encoder.max_tokens, dtype=torch.long)
    encoder.run(Tokens(ones, ones), masked=masks_padding(encoder.model))


def _text(parts: Parts) -> FrozenModel:
    """All text encoders together."""
    models = [encoder.model for encoder in parts.encoders.text.encoders.values()]
    return _frozen(nn.ModuleList(models), [layer for model in models for layer in text_layers(model)])


def _without_graph(run: Callable[[], object]) -> int:
    recorder = Recorder()
    with torch.no_grad(), recorder:
        run()
    return recorder.trace().peak


def _units(trained: nn.Module, units: list[list[nn.Module]]) -> tuple[tuple[Shape, ...], ...]:
    layers = [[p for module in unit for p in module.parameters()] for unit in units]
    inside = {id(p) for layer in layers for p in layer}
    layers.append([p for p in trained.parameters() if id(p) not in inside])
    return tuple(tuple(tuple(p.shape) for p in layer if p.requires_grad) for layer in layers)


def _frozen(module: nn.Module | None, layers: list[nn.Module]) -> FrozenModel:
    return FrozenModel(module_bytes(module), tuple(module_bytes(layer) for layer in layers))


def _flat(units: list[list[nn.Module]]) -> list[nn.Module]:
    return [module for unit in units for module in unit]


def _elements(module: nn.Module, trained: bool) -> tuple[int, ...]:
    return tuple(p.numel() for p in module.parameters() if p.requires_grad == trained)
