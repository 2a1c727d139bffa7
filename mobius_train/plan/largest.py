"""The largest batch, number of frames and resolution that fit a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan.gpus import Gpu
from mobius_train.plan.planner import Planner


@dataclass(frozen=True)
class Quantity:
    """A quantity in a recipe on which memory depends.

    Attributes:
        step: values are multiples of it.
        smallest, largest: limits of the search, in steps.
        load: maps a value in steps to a number to which memory is about proportional.
        stages: the stages to which the quantity applies.
    """

    name: str
    step: int
    smallest: int
    largest: int
    value: Callable[[RunConfig], int]
    changed: Callable[[RunConfig, int], RunConfig]
    load: Callable[[int], float] = float
    stages: tuple[str, ...] = ("text-to-video", "text-to-image", "autoencoder")

    def applies(self, config: RunConfig) -> bool:
        """The quantity applies to the recipe's stage, and buckets do not override it."""
        return config.stage in self.stages and not (self.name.startswith("data.") and config.data.buckets)

    def text(self, found: int | None) -> str:
        """The result of a search. At the end of the search more may fit."""
        return "none" if found is None else f"{found}+" if found == self.largest * self.step else str(found)


def _data(config: RunConfig, **changes: int) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


FRAMES = Quantity(
    "data.num_frames",
    1,
    2,
    1024,
    lambda config: config.data.num_frames,
    lambda config, value: _data(config, num_frames=value),
    stages=("text-to-video",),
)
QUANTITIES = (
    Quantity(
        "train_batch_size",
        1,
        1,
        4096,
        lambda config: config.train_batch_size,
        lambda config, value: config.model_copy(update={"train_batch_size": value, "global_batch_size": None}),
    ),
    FRAMES,
    # Stable Diffusion's latents are an eighth of the resolution and must halve three times.
    Quantity(
        "data.resolution",
        64,
        1,
        64,
        lambda config: config.data.resolution,
        lambda config, value: _data(config, resolution=value),
        lambda value: float(value) ** 2,
    ),
)


def largest(planner: Planner, config: RunConfig, spread: Spread, gpu: Gpu, quantity: Quantity) -> int | None:
    """Find the largest value that fits with all other settings unchanged; None if no value fits.

    A straight line through the last two simulated peaks proposes the next value to simulate, so few simulations of some
    seconds each suffice. The result is simulated, and so is the next larger value unless the line clearly excludes it.
    """
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        if count not in peaks:
            changed = quantity.changed(config, count * quantity.step)
            try:
                peaks[count] = planner.plan(changed, spread, gpu).peak
            except MobiusError:
                # The models do not support it, such as more frames than positions.
                peaks[count] = 2 * max(gpu.bytes, *peaks.values())
        return peaks[count] <= gpu.bytes

    low, high = quantity.smallest, quantity.largest
    if not fits(low):
        return None
    given = min(max(quantity.value(config) // quantity.step, low + 1), high)
    low, high = (given, high + 1) if fits(given) else (low, given)
    while high - low > 1:
        guess = min(max(_proposal(quantity, peaks, gpu.bytes), low + 1), high - 1)
        if guess == low + 1 and _clearly_more(quantity, peaks, low, gpu.bytes):
            break
        low, high = (guess, high) if fits(guess) else (low, guess)
    return low * quantity.step


def _line(quantity: Quantity, peaks: dict[int, int]) -> tuple[float, float, int]:
    """Slope of the peak over the load, and the line's origin (load, peak), from the two largest values."""
    first, second = sorted(peaks)[-2:]
    loads = quantity.load(first), quantity.load(second)
    return (peaks[second] - peaks[first]) / (loads[1] - loads[0]), loads[0], peaks[first]


def _proposal(quantity: Quantity, peaks: dict[int, int], capacity: int) -> int:
    slope, load, peak = _line(quantity, peaks)
    if slope <= 0:
        # So far the peak does not depend on this quantity.
        return 2 * max(peaks)
    target = load + (capacity - peak) / slope
    count = min(peaks)
    while quantity.load(count + 1) <= target and count < quantity.largest:
        count += 1
    return count


def _clearly_more(quantity: Quantity, peaks: dict[int, int], low: int, capacity: int) -> bool:
    slope, _, _ = _line(quantity, peaks)
    growth = slope * (quantity.load(low + 1) - quantity.load(low))
    return low in sorted(peaks)[-2:] and peaks[low] + 0.5 * growth > capacity
