"""Description of an engine's saved state, checked before the state is loaded into another run."""

from __future__ import annotations

from dataclasses import dataclass

from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class Contents:
    """Settings that the state depends on; `trained` maps each trained parameter's name to its shape."""

    engine: str
    zero_stage: int | None
    """None for engines other than DeepSpeed."""
    mixed_precision: str
    use_ema: bool
    trained: dict[str, list[int]]

    def tensors(self) -> dict[str, list[int]]:
        """Shapes of all tensors of the state, by `<kind>/<parameter>`."""
        kinds = ("weights", "exp_avg", "exp_avg_sq", *(("average",) if self.use_ema else ()))
        return {f"{kind}/{name}": shape for kind in kinds for name, shape in self.trained.items()}


def check(where: str, saved: Contents, current: Contents) -> None:
    """Check that the state saved in `where` fits this run. The engine, the ZeRO stage and the precision may differ.

    Raises:
        MobiusError: the state does not fit this run.
    """
    differing = [
        name for name in {**saved.trained, **current.trained} if saved.trained.get(name) != current.trained.get(name)
    ]
    if differing:
        raise MobiusError(
            f"{where} has different trained parameters than this run: {len(differing)} differ, the first is"
            f" {differing[0]}; resume with the same model and mode"
        )
    if current.use_ema and not saved.use_ema:
        raise MobiusError(f"{where} was written without use_ema, so it has no average to resume: set use_ema=false")
