"""Compare a plan with a measurement of the same recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.measure.measure import Measurement
from mobius_train.plan.planner import CONTEXT_PART, SAVED, Plan, Planner


@dataclass(frozen=True)
class Row:
    """Planned and measured bytes of one quantity; None if not planned or not measurable."""

    name: str
    planned: int | None
    measured: int | None

    @property
    def error(self) -> float | None:
        """The plan's error relative to the measurement."""
        if not self.measured or self.planned is None:
            return None
        return self.planned / self.measured - 1


def planned(config: RunConfig, recipe: Path, spread: Spread) -> Plan:
    """Plan one rank with the settings of `measure`.

    Raises:
        MobiusError: see `Planner.plan`.
    """
    return Planner(recipe).plan(config.model_copy(update={"global_batch_size": None}), spread)


def rows(plan: Plan, measured: Measurement) -> list[Row]:
    """Rows for the components, the tensors saved for backward, and on a GPU each phase's peak without the context."""
    found = list(_components(plan, measured))
    for part in sorted(plan.saved.keys() | measured.saved.keys()):
        found.append(Row(SAVED + part, plan.saved.get(part, 0), measured.saved.get(part, 0)))
    found.append(Row("saved for backward", sum(plan.saved.values()), sum(measured.saved.values())))
    context = plan.parts.get(CONTEXT_PART, 0)
    for phase, peak in measured.phases.items():
        total = plan.phases.get(phase)
        found.append(Row(f"peak of {phase}", None if total is None else total - context, peak.allocated))
    if measured.peak is not None:
        covered = [total for phase, total in plan.phases.items() if phase in measured.phases]
        found.append(Row(PEAK, max(covered) - context, measured.peak))
        found.append(Row(CONTEXT_PART, context, measured.outside))
    return found


PEAK = "peak, context apart"


def _components(plan: Plan, measured: Measurement) -> Iterator[Row]:
    for name, size in measured.components.items():
        yield Row(name, plan.parts.get(name, 0), size)


def as_json(plan: Plan, measured: Measurement) -> dict[str, Any]:
    """The full plan and measurement, and the rows; sizes in bytes, FLOPs of a micro-batch."""
    return {
        "measured": asdict(measured) | {"peak": measured.peak},
        "planned": {
            "peak": plan.peak,
            "parts": plan.parts,
            "phases": plan.phases,
            "saved": plan.saved,
            "flops": plan.flops,
            "trained": plan.trained,
        },
        "rows": [asdict(row) | {"error": row.error} for row in rows(plan, measured)],
    }
