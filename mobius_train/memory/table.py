"""The fit table of the docs: modes x ZeRO stages x GPUs at the paper's workload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobius_train.config import load
from mobius_train.durable import replace_file
from mobius_train.engine.ds_config import read
from mobius_train.errors import MobiusError
from mobius_train.memory.gpus import GPUS
from mobius_train.memory.plan import MIB, Layout, Plan, Planner

BEGIN, END = "<!-- fit table: made by tools/plan_memory.py --table -->", "<!-- end of the fit table -->"
RANKS = 4
MODES: dict[str, list[str]] = {
    "full": ["mode=full"],
    "serial": ["mode=serial"],
    "parallel": [],
    "parallel, recomputed": ["gradient_checkpointing=true"],
}
# The paper's measurements, MB (of 2^20 bytes, as nvidia-smi prints them), and what they were made with.
PAPER: tuple[tuple[str, int, list[str], Layout], ...] = (
    ("serial, materialised attention", 37758, ["mode=serial", "attention_backend=eager"], Layout(RANKS, "ddp")),
    ("parallel", 28898, [], Layout(RANKS, "ddp")),
)


@dataclass(frozen=True)
class Reproduced:
    """One of the paper's figures and what is planned for it, MiB."""

    name: str
    measured: int
    plan: Plan

    @property
    def error(self) -> float:
        """Relative to the measured figure."""
        return self.plan.peak / MIB / self.measured - 1


def reproduce_paper(planner: Planner, recipe: Path) -> list[Reproduced]:
    """Plan the two runs whose memory the paper gives (arXiv 2407.06617): 4 GPUs, float32, DDP, batch 2."""
    return [
        Reproduced(name, measured, planner.plan(load(recipe, overrides), layout))
        for name, measured, overrides, layout in PAPER
    ]


def renew(page: Path, repository: Path) -> None:
    """Write the tables between their marks in a Markdown page.

    Raises:
        MobiusError: the page can't be read, or has no such marks.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise MobiusError(f"cannot read {page}: {error.strerror}") from error
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise MobiusError(f"{page} has no place for the table: write the lines {BEGIN} and {END}")
    replace_file(page, f"{before}{BEGIN}\n{tables(repository)}\n{END}{after}")


def tables(repository: Path) -> str:
    """The tables as Markdown."""
    recipe = repository / "configs" / "paper_sd21.yaml"
    planner = Planner(recipe)
    lines = ["| the paper's run (4 GPUs, DDP, fp32) | paper, MB | planned, MiB | error |", "|---|---|---|---|"]
    for one in reproduce_paper(planner, recipe):
        lines.append(f"| {one.name} | {one.measured} (m) | {one.plan.peak / MIB:.0f} (p) | {one.error:+.1%} |")
    for precision, title in (("bf16", "bf16 (fp16 on V100)"), ("no", "fp32")):
        lines += ["", f"| {title}, {RANKS} ranks | ZeRO | peak, MiB | {' | '.join(GPUS)} |"]
        lines.append("|---" * (3 + len(GPUS)) + "|")
        lines += _rows(planner, recipe, repository / "ds_configs", precision)
    return "\n".join(lines)


def _rows(planner: Planner, recipe: Path, ds_configs: Path, precision: str) -> Iterator[str]:
    for mode, overrides in MODES.items():
        for stage in range(4):
            layout = Layout(RANKS, ds_json=read(ds_configs / f"zero{stage}.json"))
            config = load(recipe, [*overrides, f"mixed_precision='{precision}'"])
            peak = planner.plan(config, layout).peak
            cells = (_cell(gpu.bytes - peak) for gpu in GPUS.values())
            yield f"| {mode} | {stage} | {peak / MIB:.0f} (p) | {' | '.join(cells)} |"


def _cell(left: int) -> str:
    """Whether it fits, or by how many GiB it does not."""
    return "fits (p)" if left >= 0 else f"{-left / 2**30:.1f} over (p)"
