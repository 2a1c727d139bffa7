"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel

from mobius_train.models.family import Family
from mobius_train.models.sd3.image import ImageSD3
from mobius_train.models.sd3.parallel import ParallelSD3
from mobius_train.models.sd3.serial import SerialSD3

SD3 = Family(
    part="transformer",
    image_model=SD3Transformer2DModel,
    image_denoiser=ImageSD3,
    parallel=ParallelSD3,
    new_parallel=ParallelSD3.from_transformer,
    serial=SerialSD3,
    new_serial=SerialSD3.from_sd3,
)
