"""Video models: a text-to-image model with a separate ring (parallel) or with temporal layers inside (serial)."""

from mobius_train.models.backbone import Backbone, Feature
from mobius_train.models.build_denoiser import build_denoiser
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.freezing import Rule, apply_freezing
from mobius_train.models.hashing import weights_hash
from mobius_train.models.parallel import ParallelUNet
from mobius_train.models.pixart.parallel import ParallelPixArt
from mobius_train.models.sd3.parallel import ParallelSD3
from mobius_train.models.serial import SerialUNet, TemporalLayers
from mobius_train.models.unet.image import ImageUNet
from mobius_train.models.unet.ring import Ring

__all__ = [
    "Backbone",
    "Denoiser",
    "Feature",
    "ImageUNet",
    "ParallelPixArt",
    "ParallelSD3",
    "ParallelUNet",
    "Ring",
    "Rule",
    "SerialUNet",
    "TemporalLayers",
    "apply_freezing",
    "build_denoiser",
    "weights_hash",
]
