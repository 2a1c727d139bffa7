"""Draw plans as stacked bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError
from mobius_train.files import check_writable
from mobius_train.plan.largest import FRAMES
from mobius_train.plan.longest import SIZES, Longest
from mobius_train.plan.planner import MIB, Plan


def check_picture(path: Path) -> None:
    """Check before the planning that `draw` can write this file.

    Raises:
        MobiusError: matplotlib is not installed or cannot write such a file, or the folder cannot be written.
    """
    kinds = _figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise MobiusError(f"cannot write the picture {path}: its name must end in one of .{', .'.join(sorted(kinds))}")
    check_writable(path, file=True)


def _figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MobiusError("pictures require matplotlib: pip install 'mobius-train[plot]'") from error
    return Figure(**options)


def draw(plans: dict[str, Plan], path: Path) -> None:
    """Write a picture with a stacked bar for each plan, and a line at the GPU's capacity.

    Raises:
        MobiusError: matplotlib is not installed, or cannot write the file.
    """
    figure = _figure(figsize=(4 + 1.5 * len(plans), 6), layout="constrained")
    from matplotlib import colormaps

    axes = figure.add_subplot()
    names = dict.fromkeys(name for plan in plans.values() for name in plan.parts)
    colors = colormaps["tab20"]
    bottoms = dict.fromkeys(plans, 0.0)
    for number, name in enumerate(names):
        for bar, plan in plans.items():
            size = plan.parts.get(name, 0) / MIB
            axes.bar(bar, size, bottom=bottoms[bar], color=colors(number % colors.N))
            bottoms[bar] += size
        axes.bar(next(iter(plans)), 0, label=name, color=colors(number % colors.N))
    for gpu in {plan.gpu for plan in plans.values()}:
        if gpu is not None:
            axes.axhline(gpu.bytes / MIB, color="black", linestyle="--", label=gpu.name)
    axes.set_ylabel("MiB on each rank")
    axes.set_xticks(range(len(plans)), [f"{name}\n{plan.peak / MIB:.0f} MiB" for name, plan in plans.items()])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    _save(figure, path)


def draw_longest(plans: dict[str, Longest], path: Path) -> None:
    """Write a picture with a line for each GPU of each recipe: the longest clip over the number of GPUs that share it.

    Raises:
        MobiusError: matplotlib is not installed, or cannot write the file.
    """
    figure = _figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for recipe, longest in plans.items():
        for gpu, of_gpu in longest.items():
            fitting = {size: frames for size, frames in of_gpu.items() if frames is not None}
            label = gpu if len(plans) == 1 else f"{recipe}, {gpu}"
            (line,) = axes.plot(list(fitting), list(fitting.values()), marker="o", label=label)
            ends = [(size, frames) for size, frames in fitting.items() if frames == FRAMES.largest]
            if ends:
                axes.plot(*zip(*ends, strict=True), "^", markersize=11, color=line.get_color())
                axes.set_title("triangles: the search ended, and more may fit", fontsize="small")
    axes.set(xlabel="GPUs that share a clip", ylabel="frames of the longest clip", xticks=list(SIZES))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise MobiusError(f"cannot write the picture {path}: {error}") from error
