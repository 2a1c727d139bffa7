"""The transformer of PixArt-α and PixArt-Σ."""

from __future__ import annotations

from diffusers import PixArtTransformer2DModel

from mobius_train.models.family import Family
from mobius_train.models.pixart.image import ImagePixArt
from mobius_train.models.pixart.parallel import ParallelPixArt

PIXART = Family(
    part="transformer",
    image_model=PixArtTransformer2DModel,
    # The released weights name the class from which diffusers split this one.
    also_named={"Transformer2DModel": ("norm_type", "ada_norm_single")},
    drops_variance=True,
    image_denoiser=ImagePixArt,
    parallel=ParallelPixArt,
    new_parallel=ParallelPixArt.from_transformer,
)
