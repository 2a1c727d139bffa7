"""The training loop of all stages, modes and engines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from torch import Tensor

from mobius_train.checkpoint.resume import how_to_go_on
from mobius_train.checkpoint.saver import Saver
from mobius_train.config import RunConfig
from mobius_train.devices import Arriving
from mobius_train.engine.protocol import Engine, StepReport
from mobius_train.errors import MobiusError, Stopped
from mobius_train.files import finished_folder
from mobius_train.job.distributed import Distributed
from mobius_train.job.run_lock import RunLock
from mobius_train.job.stop import Stop
from mobius_train.learning_rate import learning_rates
from mobius_train.metrics.names import HELDOUT_LOSS, HELDOUT_MOTION
from mobius_train.metrics.sinks import Sinks
from mobius_train.metrics.trackers.followers import Followers
from mobius_train.metrics.weight_change import WeightChange
from mobius_train.model_card import write_model_card
from mobius_train.run_files import FINAL, SAMPLES
from mobius_train.run_page.page import write_run_page
from mobius_train.tasks.task import Shown, Task, Total

logger = logging.getLogger(__name__)

Forward = Callable[[], Tensor]


@dataclass
class Progress:
    """Progress of a run. Checkpoints store it; data order and learning rate follow from it."""

    step: int = 0
    samples_seen: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0


class Trainer:
    """Runs a task on an engine from `progress` to `max_train_steps`.

    Args:
        followers: the run's trackers; None on ranks other than rank 0.
        planned_gb: planned peak memory, recorded beside the measured; None if there is no plan.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        engine: Engine,
        distributed: Distributed,
        output_dir: Path,
        progress: Progress,
        saver: Saver,
        stop: Stop,
        weight_change: WeightChange,
        lock: RunLock | None,
        followers: Followers | None,
        planned_gb: float | None,
    ) -> None:
        self.config, self.task, self.engine = config, task, engine
        self.distributed, self.output_dir, self.progress = distributed, output_dir, progress
        self.saver, self.stop, self._weight_change, self._lock = saver, stop, weight_change, lock
        self._followers, self._planned_gb = followers, planned_gb
        self._first_step, self._waited = progress.step, 0.0
        self._enter = distributed.watch.enter
        self._learning_rate = learning_rates(config, distributed.world_size)
        self._samples_per_step = config.samples_per_step(distributed.world_size)

    def train(self) -> Shown:
        """Train to the end and return the results of the last validation.

        Raises:
            Stopped: a rank was asked to stop, and a checkpoint of the last step was saved.
        """
        config, progress = self.config, self.progress
        with self._sinks() as self._to:
            batches = self.task.ahead(self._loaded(progress.samples_seen))
            while progress.step < config.steps:
                # Validation follows the save, so a failure here loses no step. A resumed run validates again.
                if progress.step == 0 or _due(config.validation_steps, progress.step):
                    self._validate()
                    if self._to:
                        self._to.unpause()
                # Until here a request to stop ends the run at once.
                self.stop.defer()
                metrics = self._step(batches)
                if self._lock:
                    self._lock.note_step()
                stopping = metrics.pop("stopping") > 0
                if self._planned_gb is not None:
                    metrics["memory_planned_gb"] = self._planned_gb
                if self._to:
                    self._to.step(progress.step, metrics)
                self.saver.poll()
                if stopping or _due(config.checkpointing_steps, progress.step):
                    self.saver.save(asdict(progress))
                if stopping:
                    self._end_early()
            # The end of the run is saved before anything can fail that comes after it.
            self.saver.wait()
            self._check_effect()
            if progress.step not in (self._first_step, self.saver.saved):
                self.saver.save(asdict(progress))
                self.saver.wait()
            # The run's final samples come from this validation.
            shown = self._validate()
            self._export(shown)
            self.distributed.barrier()
            if progress.step not in (self._first_step, self.saver.saved):
                raise MobiusError(
                    f"final/ is written, but checkpoint-{progress.step} was not saved (see above): the run cannot be"
                    f" continued after step {self.saver.saved or self._first_step}"
                )
        return shown

    def _export(self, shown: Shown) -> None:
        """Write final/ in one step.

        Raises:
            MobiusError: it cannot be written, for example on a full disk.
        """
        self._enter("export", "the export")
        weights = self._weights()
        final = self.output_dir / FINAL
        try:
            with finished_folder(final, overwrite=True) if self.distributed.is_main else nullcontext(final) as folder:
                self.task.export(weights, folder)
                if self.distributed.is_main:
                    write_model_card(folder, self.config, self.task.overview, shown.figures, shown.paths)
        except (MobiusError, OSError, SafetensorError) as error:
            saved = self._first_step if self.saver.saved is None else self.saver.saved
            at_end = saved == self.progress.step
            what = "the whole run is" if at_end else "steps after it are lost; the run is"
            raise MobiusError(
                f"{final} was not written: {error}. Free space, then {how_to_go_on(self.config, self.output_dir)}:"
                f" {what} saved in checkpoint-{saved}"
                if saved
                else f"{final} was not written: {error}. No checkpoint could be written either"
            ) from error

    def _loaded(self, samples_seen: int) -> Iterator[Any]:
        """The loader's batches. `_waited` counts the seconds that the training waits for them."""
        batches = self.task.training_batches(samples_seen)
        while True:
            step, asked = self.progress.step + 1, time.perf_counter()
            self._enter("batch", f"step {step}, loading a batch")
            batch = next(batches)
            self._waited += time.perf_counter() - asked
            self._enter("step", f"step {step}, {batch.describe()}")
            yield batch

    def _step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Run one optimizer step and return metrics averaged over all ranks and micro-batches."""
        started, self._waited = time.perf_counter(), 0.0
        learning_rate = self._learning_rate(self.progress.step)
        losses: list[Arriving] = []
        keys: list[list[str]] = []
        report: StepReport | None = None
        while report is None:
            batch = next(batches)
            losses.append(Arriving(micro_batch(self.task, self.engine, batch)))
            keys.append(batch.keys)
            report = self.engine.step(learning_rate)
        # The engine has read the norm of the gradients, so the losses are here: the host waits once in a step.
        values = [loss.value() for loss in losses]
        self._report_bad(values, keys)
        self.progress.step += 1
        self.progress.samples_seen += self._samples_per_step
        seconds = time.perf_counter() - started
        metrics = self.distributed.mean(
            {
                "loss": sum(values) / len(values),
                "gradient_norm": report.gradient_norm,
                "learning_rate": learning_rate,
                "samples_per_second": self._samples_per_step / seconds,
                "data_wait_share": self._waited / seconds,
                "memory_gb": self.distributed.peak_memory_gb(),
                "step_applied": float(report.applied),
                # Averaged with the metrics, so that all ranks stop at the same step.
                "stopping": float(self.stop.asked()),
            }
        )
        self._count_skipped(report, metrics["loss"])
        return metrics

    def _report_bad(self, losses: list[float], keys: list[list[str]]) -> None:
        for loss, clips in zip(losses, keys, strict=True):
            if not math.isfinite(loss):
                logger.error("rank %d: the loss is %s on %s", self.distributed.rank, loss, ", ".join(clips))

    def _end_early(self) -> NoReturn:
        self.saver.wait()
        if self.distributed.is_main:
            self.stop.done(self.progress.step)
        if self.saver.saved != self.progress.step:
            raise MobiusError(
                f"stopped at step {self.progress.step} on request, but its checkpoint was not saved (see above). Free"
                f" space, then {how_to_go_on(self.config, self.output_dir)}"
            )
        if self.distributed.is_main:
            print(
                f"\nstopped at step {self.progress.step} on request: to go on,"
                f" {how_to_go_on(self.config, self.output_dir)}",
                flush=True,
            )
        self.distributed.barrier()
        raise Stopped

    def _count_skipped(self, report: StepReport, loss: float) -> None:
        """Count consecutive skipped steps; too many end the run.

        An fp16 overflow with a finite loss is not counted while the loss scale can still decrease.
        """
        self.progress.skipped += not report.applied
        scaling = report.loss_scale is not None and report.loss_scale > 1 and math.isfinite(loss)
        if report.applied or scaling:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped_in_a_row += 1
        if self.progress.skipped_in_a_row >= self.config.max_skipped_steps:
            self.saver.wait()
            raise MobiusError(
                f"{self.progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient (the last at step"
                f" {self.progress.step}) and were skipped. Samples with a non-finite loss are named above: check them,"
                " lower learning_rate, or set mixed_precision=bf16"
            )

    def _check_effect(self) -> None:
        """Name the number of skipped steps; refuse to export a model that no step has trained."""
        skipped, steps = self.progress.skipped, self.progress.step
        if skipped == steps:
            raise MobiusError(
                f"all {steps} steps had a non-finite loss or gradient and were skipped, so nothing was trained, and"
                " final/ is not written. Samples with a non-finite loss are named above: check them, lower"
                " learning_rate, or set mixed_precision=bf16. With fp16, more steps let the loss scale decrease"
            )
        if skipped and self._to:
            self._to.say(f"{skipped} of {steps} steps had a non-finite loss or gradient and were skipped")

    def _weights(self) -> dict[str, Any]:
        return self.engine.averaged_weights() if self.config.use_ema else self.engine.weights()

    def _validate(self) -> Shown:
        """Compute the held-out loss and samples with the weights that an export would use; the figures have both."""
        self._enter("validation", f"the validation at step {self.progress.step}")
        weights = self._weights()
        heldout = self._means(self.task.heldout_losses(weights))
        if self._to:
            change = self._weight_change(weights)
            moved = {f"weight_change/{part}": value for part, value in change.items()}
            self._to.write(self.progress.step, heldout | moved)
        if self._to and heldout:
            motion = f", its motion part {heldout[HELDOUT_MOTION]:.5f}" if HELDOUT_MOTION in heldout else ""
            self._to.say(f"held-out loss at step {self.progress.step}: {heldout[HELDOUT_LOSS]:.5f}{motion}")
        shown = Shown()
        # An untrained model only reproduces its backbone's images.
        if self.progress.step > 0:
            try:
                shown = self.task.show(weights, self.output_dir / SAMPLES / f"step-{self.progress.step}")
            except OSError as error:
                logger.error("the samples of step %d were not written: %s", self.progress.step, error)
            if self._to:
                if shown.figures:
                    self._to.write(self.progress.step, shown.figures)
                self._to.show(self.progress.step, shown.paths)
                self._write_page()
        self.distributed.barrier()
        return Shown(shown.paths, heldout | shown.figures)

    def _write_page(self) -> None:
        """Renew report.html. The run does not depend on it."""
        try:
            write_run_page(self.output_dir)
        except (OSError, MobiusError) as error:
            logger.error("the page of the run was not written: %s", error)

    def _means(self, totals: dict[str, Total]) -> dict[str, float]:
        """Average over all ranks, without names that no rank has a term for."""
        sums = {f"sum {name}": total.sum for name, total in totals.items()}
        counts = {f"count {name}": float(total.count) for name, total in totals.items()}
        means = self.distributed.mean(sums | counts) if totals else {}
        return {name: means[f"sum {name}"] / means[f"count {name}"] for name in totals if means[f"count {name}"]}

    def _sinks(self) -> Any:
        if self._followers is None:
            return _Silent()
        try:
            return Sinks(self.output_dir, self.progress.step, self.config.steps, self._followers)
        except OSError as error:
            where = error.filename or self.output_dir
            raise MobiusError(
                f"cannot write {where}: {error.strerror or error}: free space, or choose another output_dir"
            ) from error


class _Silent:
    """No sinks, for all ranks except rank 0."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def micro_batch(
    task: Task, engine: Engine, batch: Any, observe: Callable[[Forward], Tensor] = lambda forward: forward()
) -> Tensor:
    """Forward and backward pass of one micro-batch; the engine's step comes after it.

    Args:
        observe: runs the forward pass, and may look at it.

    Returns:
        The mean loss, a scalar without a graph, on the engine's device.
    """
    loss = observe(lambda: task.loss(engine, batch).mean())
    engine.backward(loss)
    return loss.detach()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
