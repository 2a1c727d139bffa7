"""Training a diffusion model: text-to-image (stage 1) and text-to-video (stage 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mobius_train.assembly.open_data import order_identity, recipe_batches
from mobius_train.assembly.options import store_frozen_weights
from mobius_train.assembly.parts import Parts
from mobius_train.assembly.sharded import Sharded, text_layers
from mobius_train.bars import DELAY, progress
from mobius_train.conditions import Conditions
from mobius_train.data import cache
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import ClipDataset
from mobius_train.data.describe_sets import describe_sets
from mobius_train.data.loader import Samples, heldout_batches
from mobius_train.devices import host_copy, sent
from mobius_train.diffusion.process import NoisyBatch
from mobius_train.diffusion.randomness import draw_numbers
from mobius_train.encoders.encoders import Cached, EncodedSource, Online
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.media.clip_files import write_clips
from mobius_train.models import weights_hash
from mobius_train.models.ahead import SideStream, one_ahead
from mobius_train.models.parallel_model import ParallelModel
from mobius_train.pipeline import EncodedPrompts, TextToVideoPipeline
from mobius_train.ring_shape import RingShape
from mobius_train.tasks.inference import Inference
from mobius_train.tasks.show_clips import show_clips
from mobius_train.tasks.task import Shown, Total, Weights, count

# The held-out loss must be comparable between runs with different seeds, so its noise has a separate seed.
HELDOUT_SEED = 20240709


def squared_error(prediction: Tensor, noisy: NoisyBatch) -> Tensor:
    """The unweighted mean squared error of each clip, (B,) float32."""
    return (prediction.float() - noisy.target.float()).square().flatten(1).mean(1)


def motion_error(prediction: Tensor, noisy: NoisyBatch) -> Tensor:
    """The part of `squared_error` that differs between a clip's frames, (B,) float32.

    It is the mean square of the error after the subtraction of its mean over the frames. A model that moves nothing
    right has the same motion error as its frozen backbone, however well it draws.
    """
    error = prediction.float() - noisy.target.float()
    return (error - error.mean(2, keepdim=True)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Begun:
    """A micro-batch whose frozen branch has run, or runs on a side stream.

    Attributes:
        keys: of its clips.
        description: see `EncodedBatch.describe`.
        loss: its losses, (B,), with an engine; call it once.
    """

    keys: list[str]
    description: str
    loss: Callable[[Callable[..., Any]], Tensor]

    def describe(self) -> str:
        """Its number of clips, and their bucket."""
        return self.description


class DiffusionTask:
    """Stages `text-to-image` and `text-to-video`: a trained denoiser with frozen encoders.

    Attributes:
        parts: the models; the engine runs in place of `parts.denoiser.trained`.
        source: the source of encoded batches.
    """

    def __init__(self, parts: Parts, train: ClipDataset, heldout: ClipDataset | None, distributed: Distributed) -> None:
        self.config, self.parts, self.distributed = parts.config, parts, distributed
        self._clips = {"train": train, "heldout": heldout}
        denoiser, encoders = parts.denoiser, parts.encoders
        clips: dict[str, Samples | None] = {"train": train, "heldout": heldout}
        self.source: EncodedSource = Online(clips, encoders, distributed.device, distributed.sequence)
        self._without_caption = encoders.without_caption().to(distributed.device)
        self._inference = Inference(denoiser.trained, distributed.device, parts.dtypes.trained)
        self.frozen_hash = "" if denoiser.frozen is None else weights_hash(denoiser.frozen)
        # Rank 0 exports the model with the original weights.
        keeps = self.config.frozen_int8 and distributed.is_main
        self._original = host_copy(denoiser.frozen) if keeps and denoiser.frozen is not None else None
        store_frozen_weights(denoiser, self.config)
        self._sharded_frozen: Sharded | None = None
        self._sharded_text: dict[str, Sharded] = {}
        self._before: list[Tensor] | None = None
        self._side_stream = SideStream(distributed.device)
        if self.config.shard_frozen:
            if denoiser.frozen is not None:
                layers = [module for unit in denoiser.backbone.units() for module in unit]
                self._sharded_frozen = Sharded(denoiser.frozen, layers, distributed)
            if self.config.data.cache_dir is None:
                for part, encoder in encoders.text.encoders.items():
                    self._sharded_text[part] = Sharded(encoder.model, text_layers(encoder.model), distributed)

    @cached_property
    def _prompts(self) -> EncodedPrompts | None:
        """The conditions of the validation prompts, in host memory; None on ranks that do not sample."""
        validation = self.config.validation
        if not validation.prompts or not self._takes_samples:
            return None
        negative = validation.negative_prompt if validation.guidance_scale > 1 else None
        text = self.parts.encoders.text
        return EncodedPrompts.of(text, validation.prompts, negative).to(torch.device("cpu"))

    @property
    def _takes_samples(self) -> bool:
        # Models that ranks share require all of them to sample, with identical inputs.
        return self.distributed.data_rank == 0 or self.config.shard_frozen

    @property
    def trained(self) -> nn.Module:
        return self.parts.denoiser.trained

    @property
    def units(self) -> list[list[nn.Module]]:
        return self.parts.denoiser.units()

    @property
    def data_identity(self) -> dict[str, str]:
        return order_identity(self.config, self._train)

    @property
    def epoch(self) -> int:
        return self._train.epoch

    @property
    def _train(self) -> ClipDataset:
        clips = self._clips["train"]
        assert clips is not None
        return clips

    @cached_property
    def overview(self) -> dict[str, str]:
        config, denoiser = self.config, self.parts.denoiser
        kind: str = config.mode
        if kind == "parallel" and (given := config.ring_fields()):
            kind += f" ({RingShape(**given)})"
        frozen = denoiser.frozen if denoiser.frozen is not None else denoiser.trained
        heldout = self._clips["heldout"]
        # A new model, although the recipe may name a pretrained one.
        source = config.pretrained_model_name_or_path if config.unet_config is None else "unet_config"
        data = config.data
        size = "in buckets" if data.buckets else f"{data.num_frames} x {data.resolution} px"
        where = "latents encoded at each step" if data.cache_dir is None else f"latents cached in {data.cache_dir}"
        return {
            "model": f"{config.stage}{f', {kind}' if config.stage == 'text-to-video' else ''}: "
            f"{type(denoiser.image_model).__name__} of {source}",
            "parameters": f"{count(denoiser.trained, True)} trained, {count(frozen, False)} frozen",
            "data": f"{len(self._train)} clips, {0 if heldout is None else len(heldout)} held out; {size}; {where}",
            **describe_sets(self._train),
        }

    def prepare_data(self) -> None:
        """Add missing latents and conditions to the cache, and use the cache as the source."""
        root = self.config.data.cache_dir
        if root is None:
            return
        rank, ranks = self.distributed.rank, self.distributed.world_size
        samples: dict[str, Samples | None] = dict.fromkeys(self._clips)
        keys = {name: clips.keys for name, clips in self._clips.items() if clips is not None}
        if self.config.data.cache_required:
            for name, identity in self._identities.items():
                samples[name] = cache.open_built(root, name, identity, keys[name], rank, ranks)
        else:
            self.fill_cache(rank, ranks)
            # The others judge themselves.
            self.distributed.watch.enter("", "waiting for the other ranks' latents")
            self.distributed.barrier()
            for name, identity in self._identities.items():
                samples[name] = cache.open_checked(root, name, identity, keys[name])
        _ = self._prompts  # Encoded for all validations while the text encoders are in place.
        # Rank 0 exports the model.
        keep_text = self.distributed.is_main
        self.source = Cached(samples, self.parts.encoders, self.distributed.device, keep_text)

    def fill_cache(self, share: int, shares: int) -> None:
        """Compute share `share` of `shares` of the missing cache entries.

        Raises:
            MobiusError: the recipe has no data.cache_dir.
        """
        root = self.config.data.cache_dir
        if root is None:
            raise MobiusError("no folder for latents: set data.cache_dir=FOLDER")
        for name, identity in self._identities.items():
            clips = self._clips[name]
            assert clips is not None
            folder, encode = cache.folder_of(root, name, identity), partial(self._encode, clips)
            if share == 0 and (differing := cache.differing(root, name, identity)):
                print(f"no latent cache in {root} fits the {name} clips: the nearest differs in {', '.join(differing)}")
            cache.build(folder, clips.keys, encode, share=share, shares=shares, name=name, identity=identity)

    @cached_property
    def _identities(self) -> dict[str, dict[str, str]]:
        """The identity of each set's cache: everything that its content depends on."""
        encoders = self.parts.encoders.identity()
        return {name: clips.identity | encoders for name, clips in self._clips.items() if clips is not None}

    def _encode(self, clips: ClipDataset, index: int) -> EncodedClip:
        self.distributed.watch.enter("clip", f"encoding {clips.keys[index]} for the latent cache")
        return self.parts.encoders.encode(clips[index], clips.captions(index)[1:])

    def training_batches(self, samples_seen: int) -> Iterator[ClipBatch | EncodedBatch]:
        samples = self.source.samples["train"]
        assert samples is not None
        return recipe_batches(self.config, self._train, samples, self.source.collate, self.distributed, samples_seen)

    def ahead(self, batches: Iterator[ClipBatch | EncodedBatch]) -> Iterator[ClipBatch | EncodedBatch | Begun]:
        return one_ahead(map(self.begin, batches)) if self.config.frozen_ahead else batches

    def begin(self, batch: ClipBatch | EncodedBatch) -> Begun:
        """Begin the loss of a micro-batch with all that does not depend on the trained weights, on a side stream."""
        model = cast(ParallelModel, self.parts.denoiser)
        with self._side_stream.running() as wait:
            noisy, conditions = self._noisy(batch)
            end = model.begin(*self._model_input(noisy, conditions), ahead=True)

        def loss(engine: Callable[..., Any]) -> Tensor:
            wait()
            return squared_error(end(engine), noisy) * noisy.weight

        return Begun(batch.keys, batch.describe(), loss)

    def loss(self, engine: Callable[..., Any], batch: ClipBatch | EncodedBatch | Begun) -> Tensor:
        if isinstance(batch, Begun):
            return batch.loss(engine)
        noisy, conditions = self._noisy(batch)
        return squared_error(self._predict(noisy, conditions, engine), noisy) * noisy.weight

    def _noisy(self, batch: ClipBatch | EncodedBatch) -> tuple[NoisyBatch, Conditions]:
        """The noisy latents of a training batch and their conditions, on the device."""
        encoded = self.source.on_device(batch)
        draws = draw_numbers(self.config.seed, encoded.sample_index, encoded.mean.shape[1:])
        noisy = self.parts.process.noisy(self._latents(encoded, draws.posterior), draws)
        # Classifier-free guidance requires training on some clips without a caption.
        keep = sent(draws.dropout >= self.config.objective.caption_dropout, encoded.mean.device)
        return noisy, encoded.conditions.where(keep, self._without_caption)

    def _predict(self, noisy: NoisyBatch, conditions: Conditions, trained: Callable[..., Any]) -> Tensor:
        return self.parts.denoiser.predict(*self._model_input(noisy, conditions), trained=trained)

    def _model_input(self, noisy: NoisyBatch, conditions: Conditions) -> tuple[Tensor, Tensor, Conditions]:
        dtype = self.parts.dtypes.trained
        return noisy.sample.to(dtype), noisy.timesteps, conditions.to(dtype=dtype)

    def _latents(self, encoded: EncodedBatch, noise: Tensor) -> Tensor:
        return self.parts.encoders.images.latents(
            encoded.mean, encoded.std, sent(noise, encoded.mean.device, encoded.mean.dtype)
        )

    def heldout_losses(self, weights: Weights) -> dict[str, Total]:
        """See `errors`."""
        return self.errors("heldout", weights)

    @torch.no_grad()
    def errors(self, name: Literal["train", "heldout"], weights: Weights) -> dict[str, Total]:
        """Unweighted errors at fixed quantiles of the schedule, with the same noise in every run.

        `heldout_loss` and `heldout_motion` (see `motion_error`) are the means over all quantiles; `heldout_loss/0.5`
        and so on are those of one quantile. Clips of one frame have no motion error.

        Args:
            name: the set of clips, and the prefix of the errors' names.
        """
        clips, samples = self._clips[name], self.source.samples[name]
        if clips is None or samples is None:
            return {}
        of_loss, of_motion = f"{name}_loss", f"{name}_motion"
        model = self._inference.model(weights)
        quantiles = self.config.validation.timestep_quantiles
        bar = progress(
            total=len(range(self.distributed.data_rank, len(samples), self.distributed.data_size)),
            desc=f"{name} loss",
            unit="clip",
            delay=DELAY,
            leave=False,
            disable=not self.distributed.is_main,
        )
        errors: dict[str, list[list[float]]] = {of_loss: [[] for _ in quantiles]}
        if self.config.stage == "text-to-video":
            errors[of_motion] = [[] for _ in quantiles]
        for batch, mine in heldout_batches(
            samples,
            self.source.collate,
            batch_size=self.config.train_batch_size,
            rank=self.distributed.data_rank,
            world_size=self.distributed.data_size,
            shapes=clips.shapes,
            first_frame=self.config.data.random_frame,
            even=self.config.shard_frozen,
        ):
            encoded = self.source.on_device(batch)
            draws = draw_numbers(HELDOUT_SEED, encoded.sample_index, encoded.mean.shape[1:])
            latents = self._latents(encoded, draws.posterior)
            for number, quantile in enumerate(quantiles):
                noisy = self.parts.process.noisy(latents, draws, quantile)
                prediction = self._predict(noisy, encoded.conditions, model)
                errors[of_loss][number] += squared_error(prediction, noisy)[mine].tolist()
                if of_motion in errors and latents.shape[2] > 1:
                    errors[of_motion][number] += motion_error(prediction, noisy)[mine].tolist()
            bar.update(int(mine.sum()))
        bar.close()
        totals = {}
        for kind, by_quantile in errors.items():
            totals[kind] = Total(sum(map(sum, by_quantile)), sum(map(len, by_quantile)))
            for quantile, values in zip(quantiles, by_quantile, strict=True):
                totals[f"{kind}/{quantile:g}"] = Total(sum(values), len(values))
        return totals

    def pipeline(self, weights: Weights, whole: bool = False) -> TextToVideoPipeline:
        """The pipeline with the given weights for sampling; with `whole` for saving, which is collective."""
        text_encoders: dict[str, nn.Module] = {}
        if whole:
            text_encoders = {part: sharded.whole() for part, sharded in self._sharded_text.items()}
        frozen = None
        if whole:
            frozen = self._original if self._sharded_frozen is None else self._sharded_frozen.whole()
        model = self.parts.denoiser.with_trained(self._inference.model(weights), frozen)
        return self.parts.pipeline(model, text_encoders)

    def show(self, weights: Weights, folder: Path) -> Shown:
        validation = self.config.validation
        main = self.distributed.is_main
        if self._prompts is None:
            return Shown()
        pipeline = self.pipeline(weights)
        pipeline.set_progress_bar_config(disable=not main)
        options: dict[str, Any] = {
            "conditions": self._prompts.to(self.distributed.device),
            "num_inference_steps": validation.num_inference_steps,
            "seed": validation.seed,
        }
        with self.source.autoencoder_on_device():
            clips = pipeline(validation.prompts, output_type="uint8", **options).frames
            if clips.shape[1] > 1 and self._before is None and self._keeps_the_image_model:
                self._before = list(pipeline.image_clips(validation.prompts, **options))
        if not main:
            return Shown()
        if clips.shape[1] == 1:
            return Shown(write_clips(list(clips), validation.prompts, folder))
        return show_clips(validation.prompts, list(clips), self._before, self._train, folder)

    @property
    def _keeps_the_image_model(self) -> bool:
        """The image model inside is that of the start, so it can sample the clips from before training."""
        return self.config.mode != "full" and not self.config.shard_frozen

    def export(self, weights: Weights, folder: Path) -> None:
        if self.distributed.is_main or self.config.shard_frozen:
            pipeline = self.pipeline(weights, whole=True)
        if self.distributed.is_main:
            pipeline.save_pretrained(folder)
