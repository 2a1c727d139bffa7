"""The fit table of the docs: modes x ZeRO stages x GPUs at the paper's workload, and what needs least, by engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobius_train.config import load
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.measure.records import Measured, find_record, read_records
from mobius_train.plan.gpus import GPUS, Gpu
from mobius_train.plan.planner import MIB, Layout, Plan, Planner

BEGIN, END = "<!-- fit table: made by tools/plan_memory.py --table -->", "<!-- end of the fit table -->"
RANKS = 4
MODES: dict[str, list[str]] = {
    "full": ["mode=full"],
    "serial": ["mode=serial"],
    "parallel": [],
    "parallel, recomputed": ["gradient_checkpointing=true"],
}
# The least that trains the paper's ring without sharding what is frozen.
FRUGAL = ["gradient_checkpointing=true", "mixed_precision=bf16"]
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
    planner, records = Planner(recipe), read_records(repository / "benchmarks")
    lines = ["| the paper's run (4 GPUs, DDP, fp32) | paper, MB | planned, MiB | error |", "|---|---|---|---|"]
    for one in reproduce_paper(planner, recipe):
        lines.append(f"| {one.name} | {one.measured} (m) | {one.plan.peak / MIB:.0f} (p) | {one.error:+.1%} |")
    zeros = [read_ds_json(repository / "ds_configs" / f"zero{stage}.json") for stage in range(4)]

    def row(name: str, overrides: list[str], layout: Layout) -> str:
        config = load(recipe, ["global_batch_size=null", *overrides])
        peak = planner.plan(config, layout).peak
        cells = (_cell(gpu, peak, find_record(records, gpu.name, config, layout)) for gpu in GPUS.values())
        return f"| {name} | {peak / MIB:.0f} (p) | {' | '.join(cells)} |"

    for precision, title in (("bf16", "bf16 (fp16 on V100)"), ("no", "fp32")):
        lines += _head(f"{title}, {RANKS} ranks | ZeRO")
        for mode, options in MODES.items():
            for stage, zero in enumerate(zeros):
                overrides = [*options, f"mixed_precision='{precision}'"]
                lines.append(row(f"{mode} | {stage}", overrides, Layout(RANKS, ds_json=zero)))
    for ranks in (1, RANKS):
        lines += _head(f"parallel, recomputed, bf16, {ranks} rank{'s' if ranks > 1 else ''} | AdamW | encoders")
        for engine, layout in (("ZeRO-2", Layout(ranks, ds_json=zeros[2])), ("FSDP", Layout(ranks, "fsdp"))):
            for optimizer, adam in (("float32", "adamw"), ("8 bits", "adamw_8bit")):
                for encoders, cache in (("online", "null"), ("cached", "cache")):
                    overrides = [*FRUGAL, f"optimizer={adam}", f"data.cache_dir={cache}"]
                    lines.append(row(f"{engine} | {optimizer} | {encoders}", overrides, layout))
    return "\n".join(lines)


def _head(first: str) -> list[str]:
    columns = f"| {first} | peak, MiB | {' | '.join(GPUS)} |"
    return ["", columns, "|---" * (columns.count("|") - 1) + "|"]


def _cell(gpu: Gpu, peak: int, record: Measured | None) -> str:
    """Whether it fits, or by how many GiB it does not."""
    left, mark = (gpu.bytes - peak, "p") if record is None else (gpu.bytes - record.peak, "m")
    return f"fits ({mark})" if left >= 0 else f"{-left / 2**30:.1f} over ({mark})"
