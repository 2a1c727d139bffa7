"""What an engine's state belongs to, so that it is not loaded into something else."""

from __future__ import annotations

from dataclasses import dataclass

from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class Contents:
    """How the state was made; `trained` has the trained parameters' shapes by name."""

    engine: str
    zero_stage: int | None
    """DeepSpeed's."""
    mixed_precision: str
    use_ema: bool
    trained: dict[str, list[int]]

    def tensors(self) -> dict[str, list[int]]:
        """The shapes of all tensors of the state, by `<kind>/<parameter>`."""
        kinds = ("weights", "exp_avg", "exp_avg_sq", *(("average",) if self.use_ema else ()))
        return {f"{kind}/{name}": shape for kind in kinds for name, shape in self.trained.items()}


def check(where: str, saved: Contents, mine: Contents) -> None:
    """Compare what was saved `where` with this run. Another engine or ZeRO stage takes it over.

    Raises:
        MobiusError: the state cannot be that of this run.
    """
    if saved.mixed_precision != mine.mixed_precision:
        raise MobiusError(
            f"{where} was written with mixed_precision={saved.mixed_precision!r}, and this run has"
            f" {mine.mixed_precision!r}: resume with the same"
        )
    differing = [
        name for name in {**saved.trained, **mine.trained} if saved.trained.get(name) != mine.trained.get(name)
    ]
    if differing:
        raise MobiusError(
            f"{where} holds other trained parameters than this run's: {len(differing)} differ, the first is"
            f" {differing[0]}; resume with the same model and mode"
        )
    if mine.use_ema and not saved.use_ema:
        raise MobiusError(f"{where} was written without use_ema: there is no average to go on with; set use_ema=false")
