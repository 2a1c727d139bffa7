"""Plan the paper's workload in all modes, and recipes of larger models, and write the tables of docs/memory.md.

    python benchmarks/fit_table.py
    python benchmarks/fit_table.py --only models

It needs no GPU. The paper's workload is configs/paper_sd21.yaml: SD 2.1, batch 2, 8 frames, 256 px, accumulation 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.job.environment import choose_accelerator
from mobius_train.job.quiet import quiet_libraries
from mobius_train.shared_files import REPOSITORY, ZERO2

if TYPE_CHECKING:
    from mobius_train.engine.spread import Spread
    from mobius_train.plan import Planner
    from mobius_train.plan.planner import Plan

RECIPE = REPOSITORY / "configs" / "paper_sd21.yaml"
PAGE = REPOSITORY / "docs" / "memory.md"
# The tables of the page, and the lines between which they are.
MARKS = {
    "paper": ("<!-- fit table: made by benchmarks/fit_table.py -->", "<!-- end of the fit table -->"),
    "models": ("<!-- model table: made by benchmarks/fit_table.py -->", "<!-- end of the model table -->"),
}
MIB = 2**20
RANKS = 4
MODES = {
    "full": ("mode=full",),
    "serial": ("mode=serial",),
    "parallel": (),
    "parallel, recomputed": ("gradient_checkpointing=true",),
}
PRECISIONS = {"bf16": "mixed_precision=bf16", "fp32": "mixed_precision='no'"}
OPTIMIZERS = {"float32": "optimizer=adamw", "8 bits": "optimizer=adamw_8bit"}
# The kinds that the tables name.
COLUMN = ("V100-16", "L4-24", "RTX-4090-24", "V100-32", "A100-40", "H100-80", "A100-80", "H200-141")
ENCODERS = {"online": (), "cached": ("data.cache_dir=cache",)}
TAIL, TRAINED, INT8 = "tail_temporal_layers=true", "trained_tail=true", "frozen_int8=true"
# Members of the family of docs/method.md.
SHAPES = {
    "serial": ("mode=serial",),
    "the paper's ring": (),
    "ring ½": ("ring_width=0.5",),
    "ring ¼": ("ring_width=0.25",),
    "ring ½, depth 1, tail layers": ("ring_width=0.5", "fusion_depth=1", TAIL),
    "ring ½, depth 2, tail layers": ("ring_width=0.5", "fusion_depth=2", TAIL),
    "ring ¼, depth 2, tail layers": ("ring_width=0.25", "fusion_depth=2", TAIL),
    "no ring, depth 2, tail layers": ("ring_width=0", "fusion_depth=2", TAIL),
    "no ring, depth 2, tail layers, frozen int8": ("ring_width=0", "fusion_depth=2", TAIL, INT8),
    "no ring, depth 2, trained tail with tail layers": ("ring_width=0", "fusion_depth=2", TAIL, TRAINED),
    "no ring, depth 3, tail layers": ("ring_width=0", "fusion_depth=3", TAIL),
}
# Recipes of other models, and the members of the family that are planned of each.
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "sdxl": {
        "ring ½, its recipe": (),
        "the same, frozen int8": (INT8,),
        "no ring, depth 2, tail layers": ("ring_width=0", "fusion_depth=2", TAIL),
        "the paper's ring": ("ring_width=1.0",),
        "serial": ("mode=serial",),
    },
    "sd3_medium": {
        "ring, its recipe": (),
        "no ring, depth 4, tail layers": ("ring_width=0", "fusion_depth=4", TAIL),
        "Vchitect, serial": ("mode=serial",),
        "Vchitect, full": ("mode=full",),
    },
    "sd35_medium": {"ring, its recipe": (), "the same, frozen int8": (INT8,)},
}
COSTS = ("trained", "TFLOP", "saved, MiB", "recomputed", "peak", "recomputed", "and 8-bit AdamW")
# The paper's measurements (arXiv 2407.06617) in MB of 2**20 bytes, as nvidia-smi prints them: 4 GPUs, float32, DDP.
PAPER = {
    "serial, materialised attention": (37758, ("mode=serial", "attention_backend=eager")),
    "parallel": (28898, ()),
}


class Reproduced(NamedTuple):
    """A figure of the paper and the planned one, MiB."""

    name: str
    measured: int
    planned: float

    @property
    def error(self) -> float:
        """The plan's error relative to the measured figure."""
        return self.planned / self.measured - 1


def reproduce_paper(planner: Planner) -> list[Reproduced]:
    """Plan the two runs whose memory the paper gives."""
    from mobius_train.engine.spread import Spread

    return [
        Reproduced(name, measured, _peak(planner, Spread.over(RANKS, "ddp"), *overrides) / MIB)
        for name, (measured, overrides) in PAPER.items()
    ]


def tables(planner: Planner) -> Iterator[str]:
    """The lines of the tables, as Markdown."""
    from mobius_train.engine.ds_config import read_ds_json
    from mobius_train.engine.spread import Spread

    zeros = [read_ds_json(REPOSITORY / "ds_configs" / f"zero{stage}.json") for stage in range(4)]
    yield from _header(f"the paper's run ({RANKS} GPUs, DDP, fp32)", "paper, MB", "planned, MiB", "error")
    for one in reproduce_paper(planner):
        yield _row(one.name, f"{one.measured}", f"{one.planned:.0f}", f"{one.error:+.1%}")
    yield ""
    yield from _header(f"{RANKS} GPUs", "precision", *(f"ZeRO-{stage}" for stage in range(4)))
    for precision, half in PRECISIONS.items():
        for mode, options in MODES.items():
            layouts = [Spread.over(RANKS, ds_json=zero) for zero in zeros]
            yield _row(mode, precision, *(_cell(_peak(planner, layout, half, *options)) for layout in layouts))
    yield ""
    counts = (1, RANKS)
    columns = [f"{ranks} GPU{'s' * (ranks > 1)}, {encoders}" for ranks in counts for encoders in ENCODERS]
    yield from _header("parallel, recomputed, bf16", "AdamW", *columns)
    for engine in ("ZeRO-2", "FSDP"):
        for optimizer, adam in OPTIMIZERS.items():
            options = (*MODES["parallel, recomputed"], PRECISIONS["bf16"], adam)
            layouts = [Spread.over(n, "fsdp") if engine == "FSDP" else Spread.over(n, ds_json=zeros[2]) for n in counts]
            peaks = (_peak(planner, layout, *options, *cache) for layout in layouts for cache in ENCODERS.values())
            yield _row(engine, optimizer, *map(_cell, peaks))
    yield ""
    alone = Spread.over(1, ds_json=zeros[2])
    yield from _header("1 GPU, bf16, cached", *COSTS)
    for shape, fields in SHAPES.items():
        yield _row(shape, *_costs(planner, alone, fields))


def model_tables() -> Iterator[str]:
    """The lines of the table of other models, as Markdown."""
    from mobius_train.engine.ds_config import read_ds_json
    from mobius_train.engine.spread import Spread
    from mobius_train.plan import Planner

    alone = Spread.over(1, ds_json=read_ds_json(ZERO2))
    yield from _header("1 GPU, bf16, cached", *COSTS)
    for name, shapes in MODELS.items():
        recipe = REPOSITORY / "configs" / f"{name}.yaml"
        for shape, fields in shapes.items():
            yield _row(f"{name}, {shape}", *_costs(Planner(recipe), alone, fields, recipe))


def _costs(planner: Planner, alone: Spread, fields: tuple[str, ...], recipe: Path = RECIPE) -> Iterator[str]:
    """The cells of a shape: one micro-batch as it is, recomputed, and with 8-bit AdamW as well."""
    recomputed = MODES["parallel, recomputed"]
    base = (*fields, PRECISIONS["bf16"], *ENCODERS["cached"], "data.cache_required=true")
    options = (("gradient_checkpointing=false",), recomputed, (*recomputed, "optimizer=adamw_8bit"))
    kept, again, small = (_plan(planner, alone, *base, *more, recipe=recipe) for more in options)
    yield f"{kept.trained / 1e6:.0f}M"
    yield f"{sum(kept.flops.values()) / 1e12:.2f}"
    yield from (f"{sum(plan.saved.values()) / MIB:.0f}" for plan in (kept, again))
    yield from (_cell(plan.peak) for plan in (kept, again, small))


def smallest_gpu(peak: int) -> str:
    """The name of the smallest GPU with enough memory, or "none"."""
    from mobius_train.plan import GPUS

    fitting = [GPUS[name] for name in COLUMN if peak <= GPUS[name].bytes]
    return min(fitting, key=lambda gpu: gpu.bytes).name if fitting else "none"


def renewed(page: str, lines: str, marks: tuple[str, str]) -> str:
    """Replace the lines between two marks of a page.

    Raises:
        MobiusError: the page does not contain the marks.
    """
    begin, end = marks
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise MobiusError(f"the page has no marks for the tables: add the lines {begin} and {end}")
    return f"{before}{begin}\n{lines}\n{end}{after}"


def _peak(planner: Planner, layout: Spread, *overrides: str) -> int:
    return _plan(planner, layout, *overrides).peak


def _plan(planner: Planner, layout: Spread, *overrides: str, recipe: Path = RECIPE) -> Plan:
    from mobius_train.config import load

    return planner.plan(load(recipe, ["global_batch_size=null", *overrides]), layout)


def _cell(peak: int) -> str:
    return f"{peak / MIB:.0f}, {smallest_gpu(peak)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _header(*cells: str) -> tuple[str, str]:
    return _row(*cells), "|---" * len(cells) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown file to update (default: docs/memory.md)")
    parser.add_argument("--only", choices=MARKS, help="renew one of the tables; default: all")
    options = parser.parse_args()
    choose_accelerator()
    quiet_libraries()
    from mobius_train.files import replace_file
    from mobius_train.plan import Planner

    made = {"paper": lambda: tables(Planner(RECIPE)), "models": model_tables}
    for name, marks in MARKS.items():
        if options.only in (None, name):
            text = options.page.read_text(encoding="utf-8")
            replace_file(options.page, renewed(text, "\n".join(made[name]()), marks))


if __name__ == "__main__":
    run(main)
