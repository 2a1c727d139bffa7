"""What a preparation does, from sources over stages to shards: typed, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from mobius_train.config import Section
from mobius_train.prepare.emoji.source import FluentEmoji
from mobius_train.prepare.sources.archives import Archive, Shards
from mobius_train.prepare.sources.files import FileList, Folder, Metadata
from mobius_train.prepare.stages.aesthetic import Aesthetic
from mobius_train.prepare.stages.buckets import Buckets
from mobius_train.prepare.stages.caption import Caption
from mobius_train.prepare.stages.choose_frames import ChooseFrames
from mobius_train.prepare.stages.decode import Decode
from mobius_train.prepare.stages.deduplicate import Deduplicate
from mobius_train.prepare.stages.dynamics import Dynamics
from mobius_train.prepare.stages.label_frequency import LabelFrequency
from mobius_train.prepare.stages.shots import Shots as ShotStage
from mobius_train.prepare.stages.static import Static
from mobius_train.prepare.stages.stitch import Stitch
from mobius_train.prepare.stages.summarise import Summarise
from mobius_train.prepare.stages.text import Text
from mobius_train.prepare.stages.translate import Translate
from mobius_train.prepare.stages.watermark import Watermark

Source = Annotated[Folder | FileList | Metadata | Archive | Shards | FluentEmoji, Field(discriminator="kind")]
Offline = Decode | ShotStage | Static | Dynamics | Text | ChooseFrames | Buckets | Deduplicate | LabelFrequency
WithModels = Caption | Summarise | Translate | Aesthetic | Watermark | Stitch
AnyStage = Annotated[
    Offline | WithModels,
    Field(discriminator="name"),
]


class OutputConfig(Section):
    """The shards: clip i of part p of the inputs is in shard p of its split."""

    format: Literal["webp", "mp4"] = "webp"
    quality: int = Field(92, ge=1, le=100, description="of WebP")
    crf: int = Field(17, ge=0, le=51, description="of H.264")
    heldout: float = Field(
        0.0, ge=0, lt=1, description="share of groups that go to heldout-*.tar in place of train-*.tar"
    )
    seed: int = Field(0, description="of the split")


class PrepareConfig(Section):
    """A data recipe. `part_size` inputs are one unit of work and become one shard."""

    sources: tuple[Source, ...] = Field(min_length=1)
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    output: OutputConfig = OutputConfig()
    output_dir: Path
    part_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _decodes_first(self) -> PrepareConfig:
        names = [stage.name for stage in self.stages]
        if names.count("decode") != 1:
            raise ValueError(f"the stages want one decode, and have {names.count('decode')}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"a stage's name is where its score is: {', '.join(repeated)} occurs twice")
        early = [stage.name for stage in self.stages[: names.index("decode")] if stage.needs_frames]
        if early:
            raise ValueError(f"{', '.join(early)} must come after decode: they look at frames")
        return self

    def dump(self) -> str:
        """YAML that says the same again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
