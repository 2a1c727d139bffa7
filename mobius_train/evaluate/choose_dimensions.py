"""Which dimensions can be measured with the given weights, and what the others need."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from mobius_train.errors import MobiusError
from mobius_train.evaluate.aesthetic import AestheticQuality
from mobius_train.evaluate.alignment import TextAlignment
from mobius_train.evaluate.consistency import BackgroundConsistency, SubjectConsistency
from mobius_train.evaluate.dimension import Dimension
from mobius_train.evaluate.frame_encoders import CaptionEncoder, ClipEncoder, DinoEncoder
from mobius_train.evaluate.motion import MotionCorrelation, Order, TemporalFlickering


@dataclass(frozen=True)
class ModelPaths:
    """Folders and files of the models that dimensions need; None where there is none."""

    dino: Path | None = None
    clip: Path | None = None
    aesthetic: Path | None = None
    aesthetic_clip: Path | None = None


@dataclass
class Chosen:
    """The dimensions to measure, and the needs of the others by name."""

    dimensions: list[Dimension] = field(default_factory=list)
    needs: dict[str, str] = field(default_factory=dict)


def choose_dimensions(paths: ModelPaths, has_reference: bool, device: torch.device) -> Chosen:
    """Load the given models.

    Raises:
        MobiusError: a model is missing or does not fit.
    """
    chosen = Chosen([Order()])
    if find_spec("cv2") is None:
        needs = "OpenCV: pip install 'mobius-train[data]'"
        chosen.needs |= {"dynamic_dis": needs, "speed_dis": needs, "smoothness_dis": needs}
    else:
        from mobius_train.evaluate.flow import DynamicDis, SmoothnessDis, SpeedDis

        chosen.dimensions += [DynamicDis(), SpeedDis(), SmoothnessDis()]
    chosen.dimensions.append(TemporalFlickering())
    if has_reference:
        chosen.dimensions.append(MotionCorrelation())
    else:
        chosen.needs[MotionCorrelation.name] = "--reference with clips of the same captions"
    if paths.dino is None:
        chosen.needs[SubjectConsistency.name] = "--dino FOLDER (VBench: facebook/dino-vitb16)"
    else:
        chosen.dimensions.append(SubjectConsistency(DinoEncoder(paths.dino, device)))
    clip = None
    if paths.clip is None:
        needs = "--clip FOLDER (VBench: openai/clip-vit-base-patch32)"
        chosen.needs |= {BackgroundConsistency.name: needs, TextAlignment.name: needs}
    else:
        clip = ClipEncoder(paths.clip, device)
        captions = CaptionEncoder(paths.clip, device)
        chosen.dimensions += [BackgroundConsistency(clip), TextAlignment(clip, captions)]
    if paths.aesthetic is None:
        if paths.aesthetic_clip is not None:
            raise MobiusError(f"--aesthetic-clip {paths.aesthetic_clip} is the encoder of a head: add --aesthetic FILE")
        chosen.needs[AestheticQuality.name] = "--aesthetic FILE and its --aesthetic-clip FOLDER (VBench: CLIP ViT-L/14)"
    else:
        if paths.aesthetic_clip is not None:
            clip = ClipEncoder(paths.aesthetic_clip, device)
        if clip is None:
            raise MobiusError(f"--aesthetic {paths.aesthetic} needs a CLIP: add --aesthetic-clip FOLDER")
        chosen.dimensions.append(AestheticQuality(clip, paths.aesthetic))
    return chosen
