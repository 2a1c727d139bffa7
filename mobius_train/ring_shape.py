"""The shape of a ring: its width, its layers, and where it is fused with the frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class RingShape:
    """The defaults are the paper's. A family refuses the fields that its rings do not have (`taken_by`).

    Attributes:
        ring_width: channels of the ring over those of its backbone; 0: no ring.
        fusion_depth: number of the backbone's last blocks that run behind the fusion, frozen but in the graph.
        tail_temporal_layers: these blocks get temporal layers of their own, which start as the identity.
        trained_tail: the ring has trained copies of these blocks, which run in their place.
        ring_every: the ring has a layer behind every so many blocks of a transformer, and behind the last one in front
            of the fusion; None: the family's default.
        context_latents: learned tokens beside the text that each layer of a transformer's ring attends to.

    Raises:
        MobiusError: the fields contradict each other.
    """

    ring_width: float = 1.0
    fusion_depth: int = 0
    tail_temporal_layers: bool = False
    trained_tail: bool = False
    ring_every: int | None = None
    context_latents: int = 0

    def __post_init__(self) -> None:
        for name in ("tail_temporal_layers", "trained_tail"):
            if getattr(self, name) and not self.fusion_depth:
                raise MobiusError(f"{name}=true requires blocks behind the fusion: set fusion_depth")
        if not self.ring_width and not self.tail_temporal_layers:
            raise MobiusError(
                "ring_width=0 removes the ring, so only temporal layers behind the fusion can be trained: set"
                " tail_temporal_layers=true and fusion_depth"
            )
        if not self.ring_width and self.ring_every is not None:
            raise MobiusError(f"ring_every={self.ring_every} has no effect without a ring (ring_width=0): remove it")

    def __str__(self) -> str:
        shown = f"ring_width={self.ring_width:g}, fusion_depth={self.fusion_depth}"
        further = {name: value for name, value in asdict(self).items() if value and f"{name}=" not in shown}
        return shown + "".join(f", {name}={str(value).lower()}" for name, value in further.items())

    def different(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields whose values differ from the given ones, with this shape's values.

        None, the default of a family that is not known here, differs from nothing.
        """
        known = {name: value for name, value in asdict(self).items() if None not in (value, given.get(name))}
        return {name: value for name, value in known.items() if given[name] != value}

    def taken_by(self, kind: str, names: Sequence[str]) -> dict[str, Any]:
        """The fields with these names, for a family whose rings have no others.

        Raises:
            MobiusError: another field is set.
        """
        values, defaults = asdict(self), asdict(PAPER)
        found = [f"{name}={value}" for name, value in values.items() if name not in names and value != defaults[name]]
        if found:
            raise MobiusError(f"{', '.join(found)}: rings of a {kind} have only {', '.join(names)}. Remove the others")
        return {name: values[name] for name in names}


PAPER = RingShape()
RING_FIELDS = tuple(field.name for field in fields(RingShape))
# The fields of rings beside transformers alone.
TOKEN_FIELDS = ("ring_every", "context_latents")
UNET_FIELDS = tuple(name for name in RING_FIELDS if name not in TOKEN_FIELDS)


def ring_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a shape among other values, without those that are None."""
    return {name: values[name] for name in RING_FIELDS if values.get(name) is not None}
