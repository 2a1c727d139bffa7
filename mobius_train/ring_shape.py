"""The shape of a ring: its width, and where it is fused with the frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class RingShape:
    """The defaults are the paper's.

    Attributes:
        ring_width: channels of the ring over those of its backbone; 0: no ring.
        fusion_depth: number of the backbone's last blocks that run behind the fusion, frozen but in the graph.
        tail_temporal_layers: these blocks get temporal layers of their own, which start as the identity.

    Raises:
        MobiusError: the fields contradict each other.
    """

    ring_width: float = 1.0
    fusion_depth: int = 0
    tail_temporal_layers: bool = False

    def __post_init__(self) -> None:
        if self.tail_temporal_layers and not self.fusion_depth:
            raise MobiusError("tail_temporal_layers=true requires blocks behind the fusion: set fusion_depth")
        if not self.ring_width and not self.tail_temporal_layers:
            raise MobiusError(
                "ring_width=0 removes the ring, so only temporal layers behind the fusion can be trained: set"
                " tail_temporal_layers=true and fusion_depth"
            )

    def __str__(self) -> str:
        return f"ring_width={self.ring_width:g}, fusion_depth={self.fusion_depth}" + (
            ", tail_temporal_layers=true" if self.tail_temporal_layers else ""
        )

    def different(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields whose values differ from the given ones, with this shape's values."""
        return {name: value for name, value in asdict(self).items() if name in given and given[name] != value}


PAPER = RingShape()
RING_FIELDS = tuple(field.name for field in fields(RingShape))
