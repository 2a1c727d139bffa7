"""The configuration of a preparation: sources, stages and output. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mobius_train.config_sections import Section
from mobius_train.prepare.emoji.source import FluentEmoji
from mobius_train.prepare.sources.archives import Archive, Shards
from mobius_train.prepare.sources.local_files import FileList, Folder, Metadata
from mobius_train.prepare.stages.aesthetic import Aesthetic
from mobius_train.prepare.stages.buckets import Buckets
from mobius_train.prepare.stages.caption import CaptionStage
from mobius_train.prepare.stages.choose_frames import ChooseFrames
from mobius_train.prepare.stages.decode import Decode
from mobius_train.prepare.stages.deduplicate import Deduplicate
from mobius_train.prepare.stages.dynamics import Dynamics
from mobius_train.prepare.stages.label_frequency import LabelFrequency
from mobius_train.prepare.stages.shots import Shots
from mobius_train.prepare.stages.static import Static
from mobius_train.prepare.stages.stitch import Stitch
from mobius_train.prepare.stages.summarise import Summarise
from mobius_train.prepare.stages.text import Text
from mobius_train.prepare.stages.translate import Translate
from mobius_train.prepare.stages.watermark import Watermark
from mobius_train.yaml_files import dump_yaml

Source = Annotated[Folder | FileList | Metadata | Archive | Shards | FluentEmoji, Field(discriminator="kind")]
Offline = Decode | Shots | Static | Dynamics | Text | ChooseFrames | Buckets | Deduplicate | LabelFrequency
WithModels = CaptionStage | Summarise | Translate | Aesthetic | Watermark | Stitch
AnyStage = Annotated[
    Offline | WithModels,
    Field(discriminator="name"),
]


class OutputConfig(Section):
    """The shards: the clips of part p are written to shard p of their split."""

    format: Literal["webp", "mp4"] = "webp"
    quality: int = Field(92, ge=1, le=100, description="WebP quality")
    crf: int = Field(17, ge=0, le=51, description="H.264 constant rate factor")
    heldout: float = Field(
        0.0, ge=0, lt=1, description="share of the groups in heldout-*.tar; the others are in train-*.tar"
    )
    seed: int = Field(0, description="seed of the split")


class PrepareConfig(Section):
    """A data recipe. `part_size` inputs form one unit of work and one shard of each split."""

    sources: tuple[Source, ...] = Field(min_length=1)
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    output: OutputConfig = OutputConfig()
    output_dir: Path
    part_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _decodes_first(self) -> PrepareConfig:
        names = [stage.name for stage in self.stages]
        if names.count("decode") != 1:
            raise ValueError(f"the stages need exactly one decode, but have {names.count('decode')}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} occurs twice: scores are stored by the stage's name")
        early = [stage.name for stage in self.stages[: names.index("decode")] if stage.needs_frames]
        if early:
            raise ValueError(f"{', '.join(early)} must come after decode: these stages need frames")
        return self

    def dump(self) -> str:
        """The recipe as YAML, with all defaults."""
        return dump_yaml(self.model_dump(mode="json"))
