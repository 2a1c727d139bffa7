"""Where metrics go: a progress bar, metrics.jsonl and TensorBoard. Used on one rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mobius_train.durable import replace_file

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]


class Sinks:
    """All of a run's sinks, closed together."""

    def __init__(self, output_dir: Path, first_step: int, max_steps: int, tensorboard: bool) -> None:
        self._stack = ExitStack()
        logs = output_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        _drop_after(output_dir / "metrics.jsonl", first_step)
        # Line buffered: a killed run keeps every finished line.
        self._jsonl = self._stack.enter_context((output_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8"))
        self._tensorboard = SummaryWriter(str(logs), purge_step=first_step) if tensorboard else None
        if self._tensorboard:
            self._stack.callback(self._tensorboard.close)
        # Smoothing over many steps keeps the remaining time steady.
        self.bar = self._stack.enter_context(
            tqdm(
                total=max_steps,
                initial=first_step,
                desc="training",
                unit="step",
                smoothing=0.05,
                dynamic_ncols=True,
            )
        )

    def step(self, step: int, metrics: Metrics) -> None:
        """After an optimizer step: all sinks, and the bar moves on."""
        self.write(step, metrics)
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.4f} grad {metrics['gradient_norm']:.2f} lr {metrics['learning_rate']:.1e}"
            f" {metrics['samples_per_second']:.1f} clips/s wait {metrics['data_wait_share']:.0%}"
            f" mem {metrics['memory_gb']:.1f} GB",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def write(self, step: int, metrics: Metrics) -> None:
        """Record without moving the bar."""
        self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def unpause(self) -> None:
        """Training goes on after something else: that time says nothing about the steps to come."""
        self.bar.unpause()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _drop_after(path: Path, step: int) -> None:
    """Leave out the lines of later steps, which a resumed run takes again, and one that a kill has torn."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    replace_file(path, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
