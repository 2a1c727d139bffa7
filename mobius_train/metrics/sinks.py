"""Outputs of metrics: a progress bar, metrics.jsonl and the trackers. Used on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mobius_train.bars import progress
from mobius_train.metrics.json_lines import JsonLines
from mobius_train.metrics.trackers.followers import Followers
from mobius_train.run_files import METRICS

Metrics = Mapping[str, float]


class Sinks:
    """All sinks of a run. A temporarily full disk does not end the run.

    Args:
        followers: receive what metrics.jsonl receives. Their owner ends them.
    """

    def __init__(self, output_dir: Path, first_step: int, max_steps: int, followers: Followers) -> None:
        self._stack = ExitStack()
        self._followers = followers
        self._jsonl = JsonLines(output_dir / METRICS, first_step)
        self._stack.callback(self._jsonl.close)
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
        self._followers.scalars(step, metrics)

    def show(self, step: int, paths: list[Path]) -> None:
        """Show the files of a validation in the trackers."""
        self._followers.samples(step, paths)

    def unpause(self) -> None:
        """Exclude a pause of training from the estimate of the remaining time."""
        self.bar.unpause()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
