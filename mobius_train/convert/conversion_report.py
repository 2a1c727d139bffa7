"""The complete report of a conversion; anything unaccounted for is an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mobius_train.errors import MobiusError


@dataclass
class Report:
    """Every name of the source and the destination is covered by one of the lists.

    Attributes:
        mapped: converted tensors or parts and their destinations.
        left_out: contents of the source that are not in the destination, and the reasons.
        made: contents of the destination that are not from the source, and their origins.
        problems: reasons for which the conversion fails.
        checks: passed comparisons of the written files with the source.
        notes: further information for the user.
    """

    source: Path
    destination: Path
    mapped: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, condition: bool, check: str) -> None:
        """Record a check as passed or as a problem."""
        if condition:
            self.checks.append(check)
        else:
            self.problems.append(f"the check failed: {check}")

    def raise_problems(self) -> None:
        """Fail the conversion if there are problems.

        Raises:
            MobiusError: lists all problems.
        """
        if self.problems:
            listed = "\n  - ".join(self.problems)
            raise MobiusError(f"{self.source} → {self.destination}: {len(self.problems)} problem(s):\n  - {listed}")

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"{self.source} → {self.destination}"]
        lines += [f"  mapped    {what} → {where}" for what, where in self.mapped]
        lines += [f"  left out  {what}: {why}" for what, why in self.left_out] or ["  left out  nothing"]
        lines += [f"  new       {what}: {origin}" for what, origin in self.made]
        lines += [f"  checked   {check}" for check in self.checks]
        lines += [f"  note      {note}" for note in self.notes]
        return lines
