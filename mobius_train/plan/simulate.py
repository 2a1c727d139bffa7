"""One training step, the encoders and the sampling of a recipe on fake tensors: shapes and storages, no values.

The models are the project's own classes, so that what an operator keeps or copies is found out, not estimated.

Legend: B clips, C latent channels, F frames, h, w latent size, H, W pixels; L text tokens, D their width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, ChineseCLIPTextModel, CLIPTextModel

from mobius_train.assembly.build import denoiser_of
from mobius_train.assembly.open_data import largest_shape
from mobius_train.assembly.options import DTYPES, frozen_dtype
from mobius_train.assembly.sharded import text_layers
from mobius_train.config import RunConfig
from mobius_train.data.buckets import Shape as ClipShape
from mobius_train.encoders.image_encoder import to_pixels
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser
from mobius_train.models.attention import AttentionBackend, set_attention_backend
from mobius_train.models.temporal import TemporalAttention, TemporalConv
from mobius_train.models.units import layer_units
from mobius_train.plan.model_configs import ModelConfigs
from mobius_train.plan.trace import Recorder, Trace, module_bytes
from mobius_train.tasks.autoencoder import Autoencoding

# Labels of what is kept for the backward pass.
SPATIAL, RING, TEMPORAL, HEAD = "spatial", "ring", "temporal layers", "fusion and head"
# Frames that `ImageEncoder.decode` decodes at once.
DECODED_AT_ONCE = 8
Shape = tuple[int, ...]
TEXT_MODELS = {
    "clip_text_model": CLIPTextModel,
    "chinese_clip_text_model": ChineseCLIPTextModel,
}


@dataclass(frozen=True)
class FrozenModel:
    """Bytes of a frozen model, and of those of its layers that can be sharded."""

    whole: int = 0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Simulation:
    """Sizes of a recipe's models, and what its phases allocate beside them.

    Attributes:
        trained: elements of each trained parameter.
        frozen_inside: elements of each frozen parameter inside the trained module (serial).
        units: shapes of the trained parameters by layer, as the step's trace watches these; the last are in no layer.
        itemsize: bytes of an element of the trained module while it computes.
        frozen: the frozen branch beside the trained module.
        vae, text: the autoencoder and the text encoder, in float32.
        step: one micro-batch forward and backward; its mark is `forward`.
        encoding: bytes at the peak of encoding one clip and its caption.
        sampling: bytes at the peak of drawing one clip, decoding included.
        heldout: bytes at the peak of the held-out loss of one batch; 0 without held-out data.
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


@dataclass(frozen=True)
class _Models:
    """A recipe's models on fake tensors, the denoiser in the dtype that it computes in."""

    denoiser: Denoiser
    vae: Any
    text_encoder: Any


class Simulator:
    """Runs the phases of recipes on fake tensors.

    Models that differ in no setting but sizes of the data are built once.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._models: dict[str, _Models] = {}

    def simulate(self, config: RunConfig, models: ModelConfigs) -> Simulation:
        """One micro-batch, the encoders, the held-out loss and the sampling of a recipe.

        Raises:
            MobiusError: the models do not fit each other, or are of a kind that is not supported.
        """
        dtype = _simulated(DTYPES[config.mixed_precision])
        # diffusers warns of every cast.
        with self._mode, contextlib.redirect_stderr(io.StringIO()):
            try:
                if config.stage == "autoencoder":
                    return _simulate_autoencoder(config, models, dtype)
                return _simulate_denoiser(config, self._built(config, models, dtype), dtype)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise MobiusError(f"the recipe's models do not run together: {reason}") from error

    def _built(self, config: RunConfig, models: ModelConfigs, dtype: torch.dtype) -> _Models:
        same = {
            "data": config.data.model_copy(update={"num_frames": 8, "resolution": 256, "buckets": None}),
            "train_batch_size": 1,
        }
        key = f"{config.model_copy(update=same).model_dump_json()} {dtype}"
        if key not in self._models:
            self._models[key] = _build(config, models, dtype)
        return self._models[key]


def _build(config: RunConfig, models: ModelConfigs, dtype: torch.dtype) -> _Models:
    assert models.unet is not None
    assert models.text_encoder is not None
    vae, text_encoder = new_vae(models.vae), new_text_encoder(models.text_encoder)
    width, wanted = int(text_encoder.config.hidden_size), models.unet.get("cross_attention_dim")
    if width != wanted:
        raise MobiusError(
            f"the text encoder is {width} wide but the UNet's cross_attention_dim is {wanted}:"
            " choose a text encoder that fits in text_encoder_name_or_path"
        )
    _text_tokens(config, text_encoder)
    unet = UNet2DConditionModel.from_config(models.unet).eval()
    # What a compiler would save is not simulated.
    denoiser = denoiser_of(config.model_copy(update={"compile": False}), unet)
    _cast(denoiser.trained, dtype)
    if denoiser.frozen is not None:
        _cast(denoiser.frozen, _simulated(frozen_dtype(config)))
    for temporal in (False, True):
        # flash-attn keeps what PyTorch's fused kernels keep.
        backend: AttentionBackend = "eager" if config.attention_backend == "eager" else "sdpa"
        set_attention_backend(cast(nn.Module, denoiser), backend, temporal)
    return _Models(denoiser, vae, text_encoder)


def _simulate_denoiser(config: RunConfig, models: _Models, dtype: torch.dtype) -> Simulation:
    denoiser, vae, text_encoder = models.denoiser, models.vae, models.text_encoder
    tokens = _text_tokens(config, text_encoder)
    shape = largest_shape(config.data)
    if config.stage == "text-to-image":
        shape = shape._replace(num_frames=1)
    # Samples are drawn at num_frames and resolution, whatever the buckets are.
    sampled = 1 if config.stage == "text-to-image" else config.data.num_frames
    channels, reduction = int(vae.config.latent_channels), 2 ** (len(vae.config.block_out_channels) - 1)
    latent = (channels, shape.num_frames, shape.height // reduction, shape.width // reduction)
    size = config.data.resolution // reduction

    batch, guided = config.train_batch_size, 2 if config.validation.guidance_scale > 1 else 1
    heldout = 0
    if config.data.validation is not None:
        heldout = _without_graph(lambda: _predict(denoiser, batch, latent, tokens, dtype))
    sampling = 0
    if config.validation.prompts:
        parts = min(sampled, DECODED_AT_ONCE)
        sampling = max(
            _without_graph(lambda: _predict(denoiser, guided, (channels, sampled, size, size), tokens, dtype)),
            _without_graph(lambda: vae.decode(torch.randn(parts, channels, size, size)).sample),
        )
    return Simulation(
        trained=_elements(denoiser.trained, True),
        frozen_inside=_elements(denoiser.trained, False),
        units=_units(denoiser.trained),
        itemsize=dtype.itemsize,
        frozen=_frozen(denoiser.frozen, _flat(layer_units(denoiser.frozen)) if denoiser.frozen is not None else []),
        vae=_frozen(vae, []),
        text=_frozen(text_encoder, text_layers(text_encoder)),
        step=_denoiser_step(denoiser, batch, latent, tokens, dtype),
        encoding=max(
            _without_graph(lambda: _encode(vae, shape)),
            _without_graph(lambda: text_encoder(**_caption(tokens))),
        ),
        sampling=sampling,
        heldout=heldout,
    )


def _simulate_autoencoder(config: RunConfig, models: ModelConfigs, dtype: torch.dtype) -> Simulation:
    vae = AutoencoderKL.from_config(models.vae)
    model = Autoencoding(vae)
    shape = largest_shape(config.data)
    images = config.train_batch_size * (1 if config.data.random_frame else shape.num_frames)
    reduction = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = shape.height // reduction, shape.width // reduction

    def reconstruct(images: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        pixels = torch.randn(images, 3, shape.height, shape.width, dtype=dtype)
        noise = torch.randn(images, vae.config.latent_channels, height, width, dtype=dtype)
        output, mean, logvar = model(pixels, noise)
        return (output.float() - pixels.float()).flatten(1), mean.float(), logvar.float()

    evaluation = _without_graph(lambda: reconstruct(images, torch.float32))
    _cast(model, dtype)

    def loss() -> Tensor:
        error, mean, logvar = reconstruct(images, dtype)
        divergence = mean.square() + logvar.exp() - 1 - logvar
        return error.abs().mean() + error.square().mean() + divergence.mean()

    recorder = Recorder()
    return Simulation(
        trained=_elements(model, True),
        frozen_inside=(),
        units=_units(model),
        itemsize=dtype.itemsize,
        frozen=FrozenModel(),
        vae=FrozenModel(),
        text=FrozenModel(),
        step=_forward_and_backward(recorder, model, loss),
        encoding=0,
        sampling=evaluation,
        heldout=0 if config.data.validation is None else evaluation,
    )


def _denoiser_step(denoiser: Denoiser, batch: int, latent: tuple[int, ...], tokens: int, dtype: torch.dtype) -> Trace:
    recorder = Recorder()
    for part, label in _labels(denoiser):
        recorder.watch(part, label)

    def loss() -> Tensor:
        target = torch.randn(batch, *latent)
        prediction = _predict(denoiser, batch, latent, tokens, dtype)
        error = (prediction.float() - target).square().flatten(1).mean(1)
        return (error * torch.ones(batch)).mean()

    return _forward_and_backward(recorder, denoiser.trained, loss)


def _forward_and_backward(recorder: Recorder, trained: nn.Module, compute_loss: Callable[[], Tensor]) -> Trace:
    recorder.watch_gradients(trained)
    for unit in layer_units(trained):
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


def _labels(denoiser: Denoiser) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose forward pass tells which part of the model is at work."""
    frozen = denoiser.frozen
    temporal = TEMPORAL if frozen is None else RING
    yield denoiser.trained, SPATIAL if frozen is None else RING
    if frozen is not None:
        yield from ((module, SPATIAL) for module in frozen.modules())
    for name, module in denoiser.trained.named_modules():
        if isinstance(module, TemporalConv | TemporalAttention):
            yield module, temporal
        elif name.removeprefix("unet.") in ("fusion", "conv_norm_out", "conv_act", "conv_out"):
            yield module, HEAD


def _predict(denoiser: Denoiser, batch: int, latent: tuple[int, ...], tokens: int, dtype: torch.dtype) -> Tensor:
    """As `DiffusionTask.loss` calls the model."""
    text = torch.randn(batch, tokens, _text_width(denoiser))
    sample, timesteps = torch.randn(batch, *latent), torch.zeros(batch, dtype=torch.long)
    return denoiser.predict(sample.to(dtype), timesteps, text.to(dtype))


def _text_width(denoiser: Any) -> int:
    return int(denoiser.config.cross_attention_dim)


def _encode(vae: Any, shape: ClipShape) -> tuple[Tensor, Tensor]:
    """As `ImageEncoder.posterior`."""
    pixels = to_pixels(torch.zeros(shape.num_frames, 3, shape.height, shape.width, dtype=torch.uint8))
    distribution = vae.encode(pixels).latent_dist
    return distribution.mean, distribution.std


def _caption(tokens: int) -> dict[str, Tensor]:
    ones = torch.ones(1, tokens, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones}


def _without_graph(run: Callable[[], object]) -> int:
    recorder = Recorder()
    with torch.no_grad(), recorder:
        run()
    return recorder.trace().peak


def new_vae(config: dict[str, Any]) -> Any:
    return AutoencoderKL.from_config(config).requires_grad_(False).eval()


def new_text_encoder(config: dict[str, Any]) -> Any:
    values = dict(config)
    # A model of both towers: the text tower alone is used.
    if values.get("model_type") in ("clip", "chinese_clip"):
        values = values["text_config"] | {"model_type": f"{values['model_type']}_text_model"}
    kind = values.pop("model_type")
    configuration = AutoConfig.for_model(kind, **values)
    made = TEXT_MODELS[kind](configuration) if kind in TEXT_MODELS else AutoModel.from_config(configuration)
    return made.requires_grad_(False).eval()


def _text_tokens(config: RunConfig, text_encoder: Any) -> int:
    positions = int(text_encoder.config.max_position_embeddings)
    tokens = config.max_text_tokens or positions
    if tokens > positions:
        raise MobiusError(
            f"max_text_tokens={tokens} is more than the text encoder's {positions} positions: lower max_text_tokens"
        )
    return tokens


def _units(trained: nn.Module) -> tuple[tuple[Shape, ...], ...]:
    layers = [[p for module in unit for p in module.parameters()] for unit in layer_units(trained)]
    inside = {id(p) for layer in layers for p in layer}
    layers.append([p for p in trained.parameters() if id(p) not in inside])
    return tuple(tuple(tuple(p.shape) for p in layer if p.requires_grad) for layer in layers)


def _frozen(module: nn.Module | None, layers: list[nn.Module]) -> FrozenModel:
    return FrozenModel(module_bytes(module), tuple(module_bytes(layer) for layer in layers))


def _flat(units: list[list[nn.Module]]) -> list[nn.Module]:
    return [module for unit in units for module in unit]


def _elements(module: nn.Module, trained: bool) -> tuple[int, ...]:
    return tuple(p.numel() for p in module.parameters() if p.requires_grad == trained)


def _simulated(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for float16, of the same size: some CPU kernels for that have no fake counterpart."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)`, which fake parameters do not take."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
