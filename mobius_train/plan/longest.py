"""The longest clip that fits GPUs which share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mobius_train.bars import DELAY, progress
from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan.gpus import Gpu
from mobius_train.plan.largest import FRAMES, largest
from mobius_train.plan.planner import Planner

SIZES = (1, 2, 4, 8)
# Frames by GPU and by number of GPUs; None where not even the shortest clip fits.
Longest = dict[str, dict[int, int | None]]


def longest_clips(
    planner: Planner, config: RunConfig, spread_of: Callable[[int], Spread], gpus: Sequence[Gpu]
) -> Longest:
    """Find the most frames of one clip for each GPU, shared by each of `SIZES` GPUs of this kind.

    Args:
        spread_of: the spread over a number of ranks.

    Raises:
        MobiusError: the recipe trains no clips, or has buckets, which set the frames.
    """
    if not FRAMES.applies(config):
        raise MobiusError("the longest clip is that of a recipe for text-to-video without data.buckets")
    found: Longest = {}
    bar = progress(total=len(gpus) * len(SIZES), desc="planning the longest clips", unit="search", delay=DELAY)
    for gpu in gpus:
        of_gpu = found[gpu.name] = {}
        # The search starts from the recipe's frames, then from twice those of half as many GPUs.
        start = config.data.num_frames
        for size in SIZES:
            data = config.data.model_copy(update={"num_frames": max(start, size)})
            changes = {"sequence_parallel_size": size, "train_batch_size": 1, "global_batch_size": None, "data": data}
            shared = config.model_copy(update={**changes, "mixed_precision": _precision(config, gpu)})
            most = largest(planner, shared, spread_of(size), gpu, FRAMES)
            # A recipe with fewer frames than ranks is refused.
            of_gpu[size] = None if most is None or most < size else most
            start = start if most is None else 2 * most
            bar.update()
    bar.close()
    return found


def _precision(config: RunConfig, gpu: Gpu) -> str:
    return "no" if config.mixed_precision == "no" else gpu.half_precision


def _text(frames: int | None) -> str:
    return "-" if frames is None else FRAMES.text(frames)


def as_table(longest: Longest) -> str:
    """One line for each GPU, one column for each number of them; `+` where the search ended and more may fit."""
    heads = "".join(f"{size:>6} GPU{'s' if size > 1 else ' '}" for size in SIZES)
    lines = [f"{'frames of the longest clip':<28}{heads}"]
    for name, of_gpu in longest.items():
        lines.append(f"{name:<28}" + "".join(f"{_text(of_gpu[size]):>11}" for size in SIZES))
    return "\n".join(lines)
