"""The models: a 2D UNet as it is, with a ring beside it (parallel), with temporal layers in it (serial)."""

from mobius_train.models.backbone import check_backbone
from mobius_train.models.build_denoiser import build_denoiser
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.freezing import Rule, apply_freezing
from mobius_train.models.hashing import weights_hash
from mobius_train.models.image import ImageUNet
from mobius_train.models.parallel import ParallelUNet
from mobius_train.models.ring import Ring
from mobius_train.models.serial import SerialUNet, TemporalLayers

__all__ = [
    "Denoiser",
    "ImageUNet",
    "ParallelUNet",
    "Ring",
    "Rule",
    "SerialUNet",
    "TemporalLayers",
    "apply_freezing",
    "build_denoiser",
    "check_backbone",
    "weights_hash",
]
