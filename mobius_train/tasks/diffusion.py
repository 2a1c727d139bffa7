"""Training a diffusion model: text-to-image (stage 1) and text-to-video (stage 2).

Legend: B clips, C latent channels, F frames, h, w latent size; L text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.config import RunConfig
from mobius_train.data import cache
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import ClipDataset
from mobius_train.data.loader import Collate, Samples, heldout_batches, training_batches
from mobius_train.diffusion.objective import DiffusionObjective
from mobius_train.diffusion.randomness import draw
from mobius_train.encoders.encoders import Encoders
from mobius_train.engine.distributed import Distributed
from mobius_train.media import write_clips
from mobius_train.metrics.motion import motion
from mobius_train.models import Denoiser, weights_hash
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.tasks.task import Inference, Shown, Total, Weights

# The held-out loss compares runs of different seeds, so its noise has a seed of its own.
HELDOUT_SEED = 20240709


class DiffusionTask:
    """Stages `text-to-image` and `text-to-video`: a denoiser trained under frozen encoders."""

    def __init__(
        self,
        config: RunConfig,
        denoiser: Denoiser,
        objective: DiffusionObjective,
        encoders: Encoders,
        train: ClipDataset,
        heldout: ClipDataset | None,
        distributed: Distributed,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.denoiser, self.objective, self.encoders = config, denoiser, objective, encoders
        self.distributed, self.dtype = distributed, dtype
        self._clips = {"train": train, "heldout": heldout}
        self._samples: dict[str, Samples | None] = {"train": train, "heldout": heldout}
        self._collate: Collate = ClipBatch.collate
        self._empty_text = encoders.empty_text()
        self._inference = Inference(denoiser.trained, distributed.device, dtype)
        self.frozen_hash = "" if denoiser.frozen is None else weights_hash(denoiser.frozen)

    @property
    def trained(self) -> nn.Module:
        return self.denoiser.trained

    def prepare_data(self) -> None:
        """Compute latents and text embeddings that are not in the cache yet, and read from it from now on."""
        root = self.config.data.cache_dir
        if root is None:
            return
        encoders = self.encoders.identity()
        for name, clips in self._clips.items():
            if clips is None:
                continue
            identity = clips.identity | encoders
            if self.config.data.cache_required:
                self._samples[name] = cache.open_built(root, name, identity)
                continue
            folder = cache.folder_of(root, name, identity)
            cache.build(
                folder,
                clips.keys,
                partial(self._encode, clips),
                rank=self.distributed.rank,
                world_size=self.distributed.world_size,
                name=name,
                identity=identity,
            )
            self.distributed.barrier()
            self._samples[name] = cache.LatentCache(folder)
        self._collate = EncodedBatch.collate

    def _encode(self, clips: ClipDataset, index: int) -> EncodedClip:
        return self.encoders.encode(clips[index])

    def training_batches(self, samples_seen: int) -> Iterator[ClipBatch | EncodedBatch]:
        train = self._samples["train"]
        assert train is not None
        return training_batches(
            train,
            self._collate,
            batch_size=self.config.train_batch_size,
            seed=self.config.seed,
            rank=self.distributed.rank,
            world_size=self.distributed.world_size,
            samples_seen=samples_seen,
            num_workers=self.config.data.dataloader_num_workers,
            random_frame_of=self.config.data.num_frames if self.config.data.random_frame else None,
        )

    def loss(self, engine: Callable[..., Any], batch: ClipBatch | EncodedBatch) -> Tensor:
        encoded = self._encoded(batch)
        draws = draw(self.config.seed, encoded.sample_index, encoded.mean.shape[1:])
        noisy = self.objective.noisy(self._latents(encoded, draws.posterior), draws)
        keep = self.objective.keep_caption(draws).to(encoded.text.device)
        text = torch.where(keep[:, None, None], encoded.text, self._empty_text)
        prediction = self.denoiser.predict(
            noisy.sample.to(self.dtype), noisy.timesteps, text.to(self.dtype), trained=engine
        )
        return self.objective.loss(prediction, noisy)

    def _encoded(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        encoded = self.encoders.encode_batch(batch) if isinstance(batch, ClipBatch) else batch
        return encoded.to(self.distributed.device)

    def _latents(self, encoded: EncodedBatch, noise: Tensor) -> Tensor:
        return self.encoders.images.latents(encoded.mean, encoded.std, noise.to(encoded.mean))

    @torch.no_grad()
    def heldout_loss(self, weights: Weights) -> Total | None:
        """Plain mean squared error at fixed shares of the schedule, the same noise in every run."""
        heldout = self._samples["heldout"]
        if heldout is None:
            return None
        model = self._inference.model(weights)
        losses: list[float] = []
        for batch in heldout_batches(
            heldout,
            self._collate,
            batch_size=self.config.train_batch_size,
            rank=self.distributed.rank,
            world_size=self.distributed.world_size,
            max_clips=self.config.validation.max_clips,
            first_frame=self.config.data.random_frame,
        ):
            encoded = self._encoded(batch)
            draws = draw(HELDOUT_SEED, encoded.sample_index, encoded.mean.shape[1:])
            latents = self._latents(encoded, draws.posterior)
            for quantile in self.config.validation.timestep_quantiles:
                timestep = int(quantile * (self.objective.num_timesteps - 1))
                noisy = self.objective.noisy(latents, draws, torch.full((len(latents),), timestep))
                prediction = self.denoiser.predict(
                    noisy.sample.to(self.dtype), noisy.timesteps, encoded.text.to(self.dtype), trained=model
                )
                losses += (prediction.float() - noisy.target).square().flatten(1).mean(1).tolist()
        return Total(sum(losses), len(losses))

    def pipeline(self, weights: Weights) -> TextToVideoPipeline:
        """The model under the given weights, ready to sample from or to save."""
        return TextToVideoPipeline(
            vae=self.encoders.images.vae,
            text_encoder=self.encoders.text.model,
            tokenizer=self.encoders.text.tokenizer,
            unet=self.denoiser.with_trained(self._inference.model(weights)),
            scheduler=self.objective.scheduler,
            max_text_tokens=self.encoders.text.max_tokens,
            num_frames=1 if self.config.stage == "text-to-image" else self.config.data.num_frames,
            resolution=self.config.data.resolution,
            guidance_scale=self.config.validation.guidance_scale,
            frame_noise_correlation=self.config.objective.frame_noise_correlation,
        )

    def show(self, weights: Weights, folder: Path) -> Shown:
        validation = self.config.validation
        if not validation.prompts:
            return Shown()
        clips = self.pipeline(weights)(
            prompt=validation.prompts,
            negative_prompt=validation.negative_prompt,
            num_inference_steps=validation.num_inference_steps,
            seed=validation.seed,
            output_type="uint8",
        ).frames
        figures: dict[str, float] = {}
        if clips.shape[1] > 1:
            for source, shown in (("samples", clips), ("data", self._some_training_clips(64))):
                figures |= {f"{name}/{source}": value for name, value in motion(shown).items()}
        return Shown(write_clips(list(clips), validation.prompts, folder), figures)

    def _some_training_clips(self, count: int) -> Iterator[Tensor]:
        """Frames of clips spread evenly over the training data."""
        clips = self._clips["train"]
        assert clips is not None
        for index in range(0, len(clips), max(1, len(clips) // count)):
            yield clips[index].frames

    def export(self, weights: Weights, folder: Path) -> None:
        self.pipeline(weights).save_pretrained(folder)
