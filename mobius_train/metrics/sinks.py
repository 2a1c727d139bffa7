"""Outputs of metrics: a progress bar, metrics.jsonl and TensorBoard. Used on one rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from mobius_train.bars import progress
from mobius_train.metrics.json_lines import JsonLines

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class Sinks:
    """All sinks of a run, closed together. A temporarily full disk does not end the run."""

    def __init__(self, output_dir: Path, first_step: int, max_steps: int, tensorboard: bool) -> None:
        self._stack = ExitStack()
        self._logs = output_dir / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._jsonl = JsonLines(output_dir / "metrics.jsonl", first_step)
        self._stack.callback(self._jsonl.close)
        self._events = SummaryWriter(str(self._logs), purge_step=first_step) if tensorboard else None
        self._stack.callback(self._close_events)
        # Smoothing over many steps stabilises the estimate of the remaining time.
        self.bar = self._stack.enter_context(
            progress(
                total=max_steps,
                initial=first_step,
                desc="training",
                unit="step",
                smoothing=0.05,
            )
        )

    def step(self, step: int, metrics: Metrics) -> None:
        """Record an optimizer step in all sinks and advance the bar."""
        self.write(step, metrics)
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.4f} grad {metrics['gradient_norm']:.2f} lr {metrics['learning_rate']:.1e}"
            f" {metrics['samples_per_second']:.1f} clips/s wait {metrics['data_wait_share']:.0%}"
            f" mem {metrics['memory_gb']:.1f} GB",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def write(self, step: int, metrics: Metrics) -> None:
        """Record metrics without advancing the bar."""
        self._jsonl.write({"step": step, **metrics})
        if self._events:
            try:
                for name, value in metrics.items():
                    self._events.add_scalar(name, value, step)
            except OSError as error:
                # TensorBoard's writer thread ends at the first failed write; metrics.jsonl remains complete.
                logger.error("%s: %s; TensorBoard logging stops for this run", self._logs, error.strerror)
                self._close_events()
                self._events = None

    def unpause(self) -> None:
        """Exclude a pause of training from the estimate of the remaining time."""
        self.bar.unpause()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def _close_events(self) -> None:
        if self._events:
            with suppress(OSError):
                self._events.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
