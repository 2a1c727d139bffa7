"""What a conversion did: told in full, and an error when anything is unaccounted for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mobius_train.errors import MobiusError


@dataclass
class Report:
    """Every name of the source and of the destination is in one of the lists.

    Attributes:
        mapped: how many tensors, or which parts, went where: (what, where to).
        left_out: what of the source has no place in the destination, and why.
        made: what of the destination is not from the source, and where it is from.
        problems: what makes the conversion fail.
        checks: comparisons of what was read back with the source.
        notes: what a person has to know beside that.
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
        """Note a check: passed, or a problem."""
        if condition:
            self.checks.append(check)
        else:
            self.problems.append(f"the check failed: {check}")

    def raise_problems(self) -> None:
        """End the conversion here if anything is wrong with it.

        Raises:
            MobiusError: lists all problems.
        """
        if self.problems:
            listed = "\n  - ".join(self.problems)
            raise MobiusError(f"{self.source} → {self.destination}: {len(self.problems)} problem(s):\n  - {listed}")

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = [f"{self.source} → {self.destination}"]
        lines += [f"  mapped    {what} → {where}" for what, where in self.mapped]
        lines += [f"  left out  {what}: {why}" for what, why in self.left_out] or ["  left out  nothing"]
        lines += [f"  new       {what}: {origin}" for what, origin in self.made]
        lines += [f"  checked   {check}" for check in self.checks]
        lines += [f"  note      {note}" for note in self.notes]
        return lines
