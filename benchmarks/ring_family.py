"""The models that the benchmarks compare, from the paper's ring to the serial model, as fields of a recipe.

A number is that of the up blocks, or of a transformer's blocks, behind the fusion. The serial model of Stable
Diffusion 3 has Vchitect's blocks.
"""

from __future__ import annotations


def _ring(
    width: float, depth: int = 0, tail: bool = False, mode: str = "parallel", trained_tail: bool = False
) -> tuple[str, ...]:
    """All fields of a shape, because a recipe may set others."""
    # How often a ring has a layer, a transformer's recipe says.
    without = () if width else ("ring_every=null",)
    return (
        f"mode={mode}",
        f"ring_width={width:g}",
        f"fusion_depth={depth}",
        f"tail_temporal_layers={str(tail).lower()}",
        f"trained_tail={str(trained_tail).lower()}",
        *without,
    )


FAMILY: dict[str, tuple[str, ...]] = {
    # Fields of a ring have no effect here. Those of a recipe may contradict each other without a ring.
    "serial": _ring(1, mode="serial"),
    "full": _ring(1, mode="full"),
    "paper": _ring(1),
    "half": _ring(0.5),
    "quarter": _ring(0.25),
    "half-1": _ring(0.5, 1),
    "half-2": _ring(0.5, 2),
    "half-1-tail": _ring(0.5, 1, tail=True),
    "half-2-tail": _ring(0.5, 2, tail=True),
    "quarter-2-tail": _ring(0.25, 2, tail=True),
    "tail-1": _ring(0, 1, tail=True),
    "tail-2": _ring(0, 2, tail=True),
    "tail-2-trained": _ring(0, 2, tail=True, trained_tail=True),
    "tail-3": _ring(0, 3, tail=True),
    "tail-4": _ring(0, 4, tail=True),
}
