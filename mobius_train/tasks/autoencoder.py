"""Training an image autoencoder: L1 + MSE of the reconstruction + a small KL term.

Legend: B clips, F frames, H, W pixels; N = B·F images; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from mobius_train.assembly.open_data import order_identity, recipe_batches
from mobius_train.config import RunConfig
from mobius_train.data.batch import ClipBatch
from mobius_train.data.clips import ClipDataset
from mobius_train.data.describe_sets import describe_sets
from mobius_train.data.loader import HeldoutBatch, heldout_batches
from mobius_train.diffusion.randomness import sample_generator
from mobius_train.encoders.image_encoder import LatentSpace, to_frames, to_pixels
from mobius_train.job.distributed import Distributed
from mobius_train.media.contact_sheet import contact_sheet
from mobius_train.metrics.names import HELDOUT_LOSS
from mobius_train.models.units import layer_units
from mobius_train.tasks.inference import Inference
from mobius_train.tasks.task import Shown, Total, Weights, count


class Autoencoding(nn.Module):
    """AutoencoderKL with explicit posterior noise: (N, 3, H, W), (N, c, h, w) → reconstruction, mean, logvar."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def reconstruction_loss(
    pixels: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float
) -> Tensor:
    """L1 + MSE of (B, F, 3, H, W) and its reconstruction (B·F, 3, H, W) plus the weighted KL term; (B,) float32."""
    error = rearrange(reconstruction, "(b f) c h w -> b (f c h w)", b=len(pixels)).float()
    error = error - pixels.flatten(1).float()
    mean, logvar = mean.float(), logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).unflatten(0, (len(pixels), -1))
    return error.abs().mean(1) + error.square().mean(1) + kl_weight * divergence.flatten(1).mean(1)


class AutoencoderTask:
    """Stage `autoencoder`. Nothing is frozen."""

    frozen_hash = ""

    def __init__(
        self,
        config: RunConfig,
        vae: AutoencoderKL,
        train: ClipDataset,
        heldout: ClipDataset | None,
        distributed: Distributed,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.train, self.heldout, self.distributed = config, train, heldout, distributed
        self.trained = Autoencoding(vae)
        self._space = LatentSpace.of(vae.config)
        self._dtype = dtype
        self._inference = Inference(self.trained, distributed.device, torch.float32)

    @property
    def epoch(self) -> int:
        return self.train.epoch

    @cached_property
    def overview(self) -> dict[str, str]:
        heldout = 0 if self.heldout is None else len(self.heldout)
        # A new model, although the recipe may name a pretrained one.
        source = self.config.pretrained_model_name_or_path if self.config.vae_config is None else "vae_config"
        return {
            "model": f"autoencoder: AutoencoderKL of {source}",
            "parameters": f"{count(self.trained, True)} trained",
            "data": f"{len(self.train)} clips, {heldout} held out",
            **describe_sets(self.train),
        }

    @property
    def units(self) -> list[list[nn.Module]]:
        return layer_units(self.trained)

    @property
    def data_identity(self) -> dict[str, str]:
        return order_identity(self.config, self.train)

    def prepare_data(self) -> None:
        """Do nothing: pixels need no preparation."""

    def training_batches(self, samples_seen: int) -> Iterator[ClipBatch]:
        return recipe_batches(self.config, self.train, self.train, ClipBatch.collate, self.distributed, samples_seen)

    def ahead(self, batches: Iterator[ClipBatch]) -> Iterator[ClipBatch]:
        return batches

    def loss(self, engine: Callable[..., Any], batch: ClipBatch) -> Tensor:
        pixels = to_pixels(batch.frames).to(self.distributed.device, self._dtype)
        noise = self._noise(batch, self.config.seed).to(pixels)
        reconstruction, mean, logvar = engine(pixels.flatten(0, 1), noise.flatten(0, 1))
        return reconstruction_loss(pixels, reconstruction, mean, logvar, self.config.objective.kl_weight)

    def _noise(self, batch: ClipBatch, seed: int) -> Tensor:
        frames, _, height, width = batch.frames.shape[1:]
        channels, _, *size = self._space.shape(frames, height, width)
        shape = (frames, channels, *size)
        return torch.stack(
            [torch.randn(shape, generator=sample_generator(seed, i)) for i in batch.sample_index.tolist()]
        )

    @torch.no_grad()
    def heldout_losses(self, weights: Weights) -> dict[str, Total]:
        if self.heldout is None:
            return {}
        model = self._inference.model(weights)
        losses: list[float] = []
        for batch, _ in self._heldout_batches(self.distributed.rank, self.distributed.world_size):
            pixels = to_pixels(batch.frames).to(self.distributed.device)
            noise = torch.zeros_like(self._noise(batch, 0)).to(pixels)
            reconstruction, _, _ = model(pixels.flatten(0, 1), noise.flatten(0, 1))
            error = reconstruction - pixels.flatten(0, 1)
            per_clip = (error.abs() + error.square()).unflatten(0, (len(pixels), -1)).flatten(1).mean(1)
            losses += per_clip.tolist()
        return {HELDOUT_LOSS: Total(sum(losses), len(losses))}

    def _heldout_batches(self, rank: int, world_size: int) -> Iterator[HeldoutBatch]:
        assert self.heldout is not None
        return heldout_batches(
            self.heldout,
            ClipBatch.collate,
            batch_size=self.config.train_batch_size,
            rank=rank,
            world_size=world_size,
            shapes=self.heldout.shapes,
            first_frame=self.config.data.random_frame,
        )

    def _vae(self, weights: Weights) -> AutoencoderKL:
        return cast(Autoencoding, self._inference.model(weights)).vae

    @torch.no_grad()
    def show(self, weights: Weights, folder: Path) -> Shown:
        """Write a sheet of held-out (or training) clips with their reconstructions below."""
        if not self.distributed.is_main:
            return Shown()
        vae = self._vae(weights)
        clips = self.train if self.heldout is None else self.heldout
        rows: list[Tensor] = []
        captions: list[str] = []
        for index in range(min(6, len(clips))):
            clip = clips[index]
            pixels = to_pixels(clip.frames).to(self.distributed.device)
            posterior = vae.encode(pixels).latent_dist
            rows += [clip.frames, to_frames(vae.decode(posterior.mean).sample).cpu()]
            captions += [clip.caption, "reconstructed"]
        path = folder / "reconstructions.png"
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, captions, path)
        return Shown([path])

    @torch.no_grad()
    def export(self, weights: Weights, folder: Path) -> None:
        """Write vae/ with the scaling_factor that gives the training clips' latents unit variance."""
        if not self.distributed.is_main:
            return
        vae = self._vae(weights)
        count = min(256, len(self.train))
        step = len(self.train) // count
        means = torch.cat(
            [
                vae.encode(
                    to_pixels(self.train[i * step].frames).to(self.distributed.device)
                ).latent_dist.mean.flatten()
                for i in range(count)
            ]
        )
        vae.register_to_config(scaling_factor=round(1 / float(means.std()), 5))
        vae.save_pretrained(folder / "vae")
