"""The report of an evaluation: report.json. What was not measured has no value, and a text that names what it needs."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mobius_train.errors import MobiusError
from mobius_train.evaluate.dimension import Better
from mobius_train.files import read_small, replace_file


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DimensionResult(_Record):
    """A dimension over all clips.

    value: None if no clip was measured.
    meaning, better, best_for_stills: as in `Dimension`.
    clips: the number of measured clips. unmeasured: the number of others by reason.
    shuffled: the mean over the measured clips with shuffled frames.
    ahead_of_shuffled: share of clips that differ from their shuffled frames in the better direction.
    needs: the model, package or reference clips that are missing, if there are none.
    """

    value: float | None = None
    meaning: str = ""
    better: Better = "neither"
    best_for_stills: bool = False
    clips: int = 0
    unmeasured: dict[str, int] = {}
    shuffled: float | None = None
    ahead_of_shuffled: float | None = None
    needs: str | None = None


class DistanceResult(_Record):
    """The Fréchet distance to the reference clips.

    clips, reference, features: numbers of clips on both sides, and of features. With fewer clips than features the
    distance is biased upwards, so it compares only with distances of equally many clips.
    halves, shuffled: half of the reference against the other half, as it is and with shuffled frames.
    sees_order: shuffled is larger than halves.
    needs: what is missing, if the distance was not measured.
    """

    value: float | None = None
    clips: int = 0
    reference: int = 0
    features: int = 0
    halves: float | None = None
    shuffled: float | None = None
    sees_order: bool | None = None
    needs: str | None = None


class ClipResult(_Record):
    """One clip. unmeasured: reasons by dimension. vbench_file, vbench: its file in VBench's layout, and the official
    tool's figures."""

    key: str
    caption: str
    frames: int
    width: int
    height: int
    fps: float
    values: dict[str, float] = {}
    unmeasured: dict[str, str] = {}
    vbench_file: str | None = None
    vbench: dict[str, float] = {}


class VBenchResult(_Record):
    """A dimension as the official tool measured it; value is None where it did not."""

    value: float | None = None
    needs: str | None = None


class Report(_Record):
    """source, only, resolution: where the clips are. reference_too_short: reference clips left out of the distances."""

    source: str
    only: list[str] = []
    resolution: int | None = None
    reference: str | None = None
    reference_clips: int = 0
    reference_too_short: int = 0
    dimensions: dict[str, DimensionResult]
    distances: dict[str, DistanceResult]
    vbench: dict[str, VBenchResult]
    vbench_total: float | None = None
    clips: list[ClipResult]

    def write(self, path: Path) -> None:
        """
        Raises:
            MobiusError: the file cannot be written.
        """
        try:
            replace_file(path, self.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise MobiusError(f"cannot write the report {path}: {error.strerror or error}") from error


def read_report(path: Path) -> Report:
    """
    Raises:
        MobiusError: the file is missing or not a report.
    """
    try:
        return Report.model_validate_json(read_small(path))
    except OSError as error:
        raise MobiusError(f"cannot read the report {path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise MobiusError(f"{path} is not a report of tools/evaluate.py: {error}") from error
