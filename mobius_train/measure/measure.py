"""Measure the memory of real steps of a recipe on one rank, by component and by phase."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mobius_train.config import RunConfig
from mobius_train.data.batch import EncodedBatch
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.protocol import Engine
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed, peak_resident_bytes
from mobius_train.measure.random_task import random_task
from mobius_train.measure.saved import Saved, named_modules, saved_for_backward
from mobius_train.measure.step_clock import BACKWARD, FORWARD, StepClock
from mobius_train.models import Denoiser
from mobius_train.models.denoiser import branch_of_modules
from mobius_train.plan.planner import ENCODERS, ENCODING, STEPPING, TRAINING, Phase
from mobius_train.plan.zero_states import AVERAGE, FROZEN, MASTERS, OPTIMIZER, TRAINED
from mobius_train.tasks.build_task import build_task
from mobius_train.tasks.denoising import Begun, DiffusionTask
from mobius_train.trainer import Forward, micro_batch

# The planner's names for the kinds of state in `Engine.pieces`.
STATES = {"weights": MASTERS, "exp_avg": OPTIMIZER, "exp_avg_sq": OPTIMIZER, "average": AVERAGE}
# Tensors made outside the denoiser's branches.
OTHER = "other"


@dataclass(frozen=True)
class Peak:
    """Peak bytes in one phase: of live tensors, and of the allocator's memory on the GPU."""

    allocated: int
    reserved: int


@dataclass(frozen=True)
class Measurement:
    """Sizes in bytes.

    Attributes:
        device: the GPU's name, or cpu.
        components: named components that live between steps.
        resident: all bytes allocated between steps; None on a CPU.
        phases: the peak of each phase; empty on a CPU.
        outside: GPU memory outside the allocator: the context and libraries' workspaces; None on a CPU.
        saved: bytes saved for the backward pass of a micro-batch, by the part of the model that made them.
        saved_by_module: the same by the module that saves them, the largest first.
        resident_set: peak of the process in host memory.
        step_seconds: median time of an optimizer step; spread: the fastest and the slowest.
        seconds: time by part of one more optimizer step, see `StepClock`; watching the parts takes time too.
    """

    device: str
    components: dict[str, int]
    resident: int | None
    phases: dict[Phase, Peak]
    outside: int | None
    saved: dict[str, int]
    saved_by_module: dict[str, int]
    resident_set: int
    step_seconds: float
    spread: tuple[float, float]
    seconds: dict[str, float]

    @property
    def peak(self) -> int | None:
        """The most bytes allocated; None on a CPU."""
        return max((peak.allocated for peak in self.phases.values()), default=None)


def measure(
    config: RunConfig,
    recipe: Path,
    spread: Spread,
    *,
    warmup: int = 2,
    steps: int = 3,
    random_models: bool = False,
    snapshot: Path | None = None,
) -> Measurement:
    """Train some steps and measure them. Writes nothing except the snapshot.

    Args:
        recipe: the recipe's file.
        warmup: optimizer steps whose time does not count. Their memory counts, except for the step that inspects
            saved tensors, on a GPU.
        random_models: see `random_task`.
        snapshot: output file for the allocator's history, for https://pytorch.org/memory_viz.

    Raises:
        MobiusError: the recipe cannot run, has another stage, or a snapshot is requested without a GPU.
    """
    if config.stage == "autoencoder":
        raise MobiusError("stage 'autoencoder' cannot be measured: give a text-to-image or text-to-video recipe")
    # One rank represents all ranks.
    config = config.model_copy(update={"global_batch_size": None})
    with Distributed(spread.launch) as distributed:
        if snapshot is not None and distributed.device.type != "cuda":
            raise MobiusError("a snapshot requires a GPU, and none is available: remove --snapshot")
        make_engine = choose_engine(config, spread)
        task = random_task(config, recipe, distributed) if random_models else build_task(config, distributed)
        task = cast(DiffusionTask, task)
        engine = make_engine(task.trained, task.units, distributed)
        return measure_steps(config, task, engine, warmup=warmup, steps=steps, snapshot=snapshot)


def measure_steps(
    config: RunConfig,
    task: DiffusionTask,
    engine: Engine,
    *,
    warmup: int,
    steps: int,
    snapshot: Path | None = None,
) -> Measurement:
    """As `measure`, for a task and an engine that exist."""
    meter = Meter(engine.device)
    micro_batches = (2 + warmup + steps) * config.gradient_accumulation_steps
    steps_of = _Steps(config, task, engine, meter, micro_batches)
    saved = steps_of.saved()
    with _history(snapshot):
        meter.forget()
        seconds = [steps_of.step() for _ in range(warmup + steps)][warmup:]
    return Measurement(
        device=torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        components=_components(task, engine, encoders=config.data.cache_dir is None),
        resident=meter.allocated(),
        phases=meter.peaks,
        outside=meter.outside(),
        saved=by_branch(saved.made, task.parts.denoiser),
        saved_by_module=saved.nbytes,
        resident_set=peak_resident_bytes(),
        step_seconds=statistics.median(seconds),
        spread=(min(seconds), max(seconds)),
        seconds=steps_of.by_part(),
    )


@dataclass
class Meter:
    """Records the peaks of the GPU's allocator by phase; does nothing without a GPU."""

    device: torch.device
    peaks: dict[Phase, Peak] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        before = self.peaks.get(name, Peak(0, 0))
        self.peaks[name] = Peak(
            max(before.allocated, torch.cuda.max_memory_allocated(self.device)),
            max(before.reserved, torch.cuda.max_memory_reserved(self.device)),
        )

    def forget(self) -> None:
        """Free the allocator's unused memory, so that model building does not count as reserved."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def outside(self) -> int | None:
        """GPU memory outside the allocator; correct only if no other process uses the GPU."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)


class _Steps:
    """Optimizer steps as in the training loop, divided into phases."""

    def __init__(
        self, config: RunConfig, task: DiffusionTask, engine: Engine, meter: Meter, micro_batches: int
    ) -> None:
        self._config, self._task, self._engine, self._meter = config, task, engine, meter
        self._batches: Iterator[Any] = task.training_batches(0)
        self._online = config.data.cache_dir is None
        self._begun: Begun | None = None
        if not self._online:
            # Encode ahead as `prepare_data` does, without files. With a required cache this is not part of the run.
            host = torch.device("cpu")
            with nullcontext() if config.data.cache_required else meter.phase(ENCODING):
                on_device = task.source.on_device
                self._batches = iter([on_device(next(self._batches)).to(host) for _ in range(micro_batches)])
            task.parts.encoders.move(host)

    def step(self) -> float:
        """Take one optimizer step; returns its duration in seconds."""
        seconds, done = 0.0, False
        while not done:
            batch = next(self._batches)
            started = time.perf_counter()
            with self._meter.phase(ENCODING) if self._online else nullcontext():
                encoded = self._task.source.on_device(batch)
            with self._meter.phase(TRAINING):
                micro_batch(self._task, self._engine, self._ahead(encoded))
            with self._meter.phase(STEPPING):
                done = self._engine.step(self._config.learning_rate) is not None
            seconds += time.perf_counter() - started
        return seconds

    def by_part(self) -> dict[str, float]:
        """Take one optimizer step; returns its seconds by part."""
        task, engine, clock = self._task, self._engine, StepClock(self._engine.device)

        def observe(forward: Forward) -> Tensor:
            with clock.phase(FORWARD):
                return forward()

        with clock.watch(task.parts.denoiser):
            done = False
            while not done:
                batch = next(self._batches)
                with clock.phase(ENCODING) if self._online else nullcontext():
                    encoded = task.source.on_device(batch)
                with clock.phase(FORWARD):
                    ready = self._ahead(encoded)
                with clock.phase(BACKWARD):
                    micro_batch(task, engine, ready, observe)
                with clock.phase(STEPPING):
                    done = engine.step(self._config.learning_rate) is not None
        return clock.seconds()

    def _ahead(self, batch: EncodedBatch) -> EncodedBatch | Begun:
        """The batch; with `frozen_ahead` it begins, and the one before it is returned."""
        if not self._config.frozen_ahead:
            return batch
        before, self._begun = self._begun, self._task.begin(batch)
        return before or self._task.begin(batch)

    def saved(self) -> Saved:
        """Tensors saved in one micro-batch. Takes a separate step, because inspecting tensors takes time."""
        task, engine = self._task, self._engine
        device = engine.device if engine.device.type == "cuda" else None
        compiled = self._config.compile or self._config.frozen_compile
        found: list[Saved] = []

        def observe(forward: Forward) -> Tensor:
            loss, saved = saved_for_backward(forward, roots(task), device, compiled)
            found.append(saved)
            return loss

        micro_batch(task, engine, task.source.on_device(next(self._batches)), observe)
        while engine.step(self._config.learning_rate) is None:
            micro_batch(task, engine, next(self._batches))
        return found[0]


def roots(task: DiffusionTask) -> dict[str, nn.Module]:
    """The models of a run by name, for `saved_for_backward`."""
    encoders = task.parts.encoders
    return {
        "": cast(nn.Module, task.parts.denoiser),
        "vae": encoders.images.vae,
        **{part: encoder.model for part, encoder in encoders.text.encoders.items()},
    }


def _components(task: DiffusionTask, engine: Engine, encoders: bool) -> dict[str, int]:
    """Bytes by component, each storage once; `encoders`: the encoders are on the device between steps."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}

    def count(name: str, tensors: Iterator[Tensor]) -> None:
        for tensor in tensors:
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                sizes[name] = sizes.get(name, 0) + tensor.nbytes

    trained = task.trained
    # FSDP's shards are the float32 master weights, which `pieces` includes below.
    whole = [p for p in trained.parameters() if not isinstance(p, DTensor)]
    count(TRAINED, (p for p in whole if p.requires_grad))
    count(FROZEN, (p for p in whole if not p.requires_grad))
    if task.parts.denoiser.frozen is not None:
        count(FROZEN, _weights(task.parts.denoiser.frozen))
    if encoders:
        models = [encoder.model for encoder in task.parts.encoders.text.encoders.values()]
        count(ENCODERS, chain.from_iterable(map(_weights, (task.parts.encoders.images.vae, *models))))
    for name, piece in engine.pieces().items():
        count(STATES[name.partition("/")[0]], iter([piece.data]))
    return sizes


def _weights(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def by_branch(nbytes: dict[str, int], denoiser: Denoiser) -> dict[str, int]:
    """Sum bytes by module, with the names of `saved_for_backward`, over the modules of each branch."""
    branches = branch_of_modules(denoiser)
    names = {name: branches.get(module, OTHER) for name, module in named_modules({"": cast(nn.Module, denoiser)})}
    sums: dict[str, int] = {}
    for name, size in nbytes.items():
        label = names.get(name, OTHER)
        sums[label] = sums.get(label, 0) + size
    return sums


@contextmanager
def _history(snapshot: Path | None) -> Iterator[None]:
    if snapshot is None:
        yield
        return
    memory: Any = torch.cuda.memory
    record: Callable[..., None] = memory._record_memory_history
    record()
    try:
        # Write the snapshot even after an out-of-memory error, for which it is most useful.
        yield
    finally:
        memory._dump_snapshot(str(snapshot))
        record(enabled=None)
