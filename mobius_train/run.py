"""One run from its configuration to its results: assemble the parts, resume, train, report."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mobius_train.checkpoint.resume import find, resume
from mobius_train.checkpoint.saver import Identity, Retention, Saver
from mobius_train.config import RunConfig
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import be_deterministic
from mobius_train.job.quiet import quiet_libraries
from mobius_train.job.stop import Stop
from mobius_train.job.versions import versions
from mobius_train.metrics.weight_change import WeightChange
from mobius_train.preflight import preflight
from mobius_train.tasks.build_task import build_task
from mobius_train.tasks.task import HELDOUT_LOSS, HELDOUT_MOTION, Shown, Task
from mobius_train.trainer import Progress, Trainer, micro_batch

# Figures of the samples in the report; see `mobius_train.metrics.motion`.
FIGURES = {
    "motion_correlation": "motion correlation",
    "neighbour_ratio": "neighbour ratio",
    "frame_difference": "frame to frame",
    "half_clip_difference": "over half a clip",
}
SOURCES = {"/data": "in the data", "/before": "before training", "/samples": "after"}


def train(config: RunConfig, spread: Spread) -> None:
    """Train, and print the paths of the results."""
    started = time.monotonic()
    quiet_libraries()
    if config.deterministic:
        be_deterministic()
    with Distributed(spread.launch) as distributed:
        make_engine = choose_engine(config, spread)
        output_dir = _output_dir(config, distributed)
        if distributed.world_size > 1:
            _preflight(config, spread, output_dir, distributed)
        name = config.resume_from_checkpoint
        folder = None if name is None else find(output_dir, name, distributed)
        task = build_task(config, distributed)
        # Also of a resumed run: a checkpoint is loaded later, and the seed gives new layers the same weights again.
        change = WeightChange((name, p) for name, p in task.trained.named_parameters() if p.requires_grad)
        engine = make_engine(task.trained, task.units, distributed)
        progress = Progress()
        identity = _identity(config, output_dir, task, distributed)
        if folder is not None:
            progress = Progress(**resume(folder, engine, identity, distributed, config.resume_with_changed_data))
            if distributed.is_main:
                print(f"resumed from {folder}", flush=True)
        task.prepare_data()
        # The folder is created only after all input has been checked.
        _claim(output_dir, identity.config, distributed)
        retention = Retention(config.checkpoints_total_limit, config.checkpoints_keep_every)
        stop = Stop(output_dir if distributed.is_main else None)
        with Saver(output_dir, engine, identity, retention, distributed) as saver, stop.listening():
            shown = Trainer(config, task, engine, distributed, output_dir, progress, saver, stop, change).train()
        if distributed.is_main:
            _report(output_dir, shown, time.monotonic() - started, distributed.peak_memory_gb())
        # All ranks end together, because srun kills the others a few seconds after the first.
        distributed.barrier()


def check_nodes(config: RunConfig, spread: Spread) -> None:
    """Run only the preflight. Leaves no files."""
    quiet_libraries()
    with Distributed(spread.launch) as distributed:
        choose_engine(config, spread)
        _preflight(config, spread, _output_dir(config, distributed), distributed)


def dry_run(config: RunConfig, spread: Spread) -> None:
    """Load, check and run one forward and backward pass. Writes nothing."""
    quiet_libraries()
    if config.deterministic:
        be_deterministic()
    with Distributed(spread.launch) as distributed:
        make_engine = choose_engine(config, spread)
        task = build_task(config, distributed)
        engine = make_engine(task.trained, task.units, distributed)
        loss = micro_batch(task, engine, next(task.training_batches(0)))
        mean = distributed.mean({"loss": float(loss)})["loss"]
        if distributed.is_main:
            trained = _count(task, True)
            print(
                f"dry run: {config.stage}, {trained / 1e6:.2f}M trained parameters on {distributed.world_size} rank(s),"
                f" loss of one micro-batch {mean:.4f},"
                f" peak memory {distributed.peak_memory_gb():.2f} GB; nothing was written"
            )


def _preflight(config: RunConfig, spread: Spread, output_dir: Path, distributed: Distributed) -> None:
    line = preflight(config, spread, output_dir, distributed)
    if distributed.is_main:
        print(line, flush=True)


def _count(task: Task, trained: bool) -> int:
    return sum(p.numel() for p in task.trained.parameters() if p.requires_grad == trained)


def _output_dir(config: RunConfig, distributed: Distributed) -> Path:
    """Return output_dir with `{time}` replaced by the start time of the run, equal on every rank."""
    if config.resume_from_checkpoint is not None and "{time}" in str(config.output_dir):
        raise MobiusError(
            f"resume_from_checkpoint={config.resume_from_checkpoint}, but output_dir={config.output_dir} is a new"
            " folder at each start: set output_dir to the folder of the run to resume"
        )
    stamp = distributed.broadcast_object(time.strftime("%Y%m%d-%H%M%S"))
    output_dir = Path(str(config.output_dir).replace("{time}", stamp))
    if config.resume_from_checkpoint is None and output_dir.exists() and any(output_dir.iterdir()):
        raise MobiusError(
            f"{output_dir} is not empty: choose another output_dir, or resume with resume_from_checkpoint=latest"
        )
    return output_dir


def _identity(config: RunConfig, output_dir: Path, task: Task, distributed: Distributed) -> Identity:
    return Identity(
        config=config.model_copy(update={"output_dir": output_dir}).dump(),
        global_batch_size=config.samples_per_step(distributed.world_size),
        frozen_sha256=task.frozen_hash,
        frozen_source=config.pretrained_model_name_or_path if task.frozen_hash else None,
        versions=versions(),
        data=task.data_identity,
    )


def _claim(output_dir: Path, config: str, distributed: Distributed) -> None:
    """Create the output folder and write the resolved configuration to it."""
    if distributed.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(output_dir / "config.yaml", config)
    distributed.barrier()


def _report(output_dir: Path, shown: Shown, seconds: float, memory_gb: float) -> None:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    print(f"\nDone in {seconds / 60:.1f} minutes, peak memory {memory_gb:.2f} GB.")
    for name, meaning in ((HELDOUT_LOSS, "held-out loss"), (HELDOUT_MOTION, "its motion part")):
        values = [line[name] for line in lines if name in line]
        if values:
            print(f"  {meaning:<18} {values[0]:.5f} before, {values[-1]:.5f} after")
    changes = [line for line in lines if "weight_change/all" in line]
    print(f"  weights            changed by {changes[-1]['weight_change/all']:.1%} of their norm")
    for name, meaning in FIGURES.items():
        values = [f"{shown.figures[name + s]:.2f} {text}" for s, text in SOURCES.items() if name + s in shown.figures]
        if values:
            print(f"  {meaning:<18} {', '.join(values)}")
    if "motion_correlation/clips" in shown.figures:
        print(f"                     (the motion of {shown.figures['motion_correlation/clips']:.0f} training clips)")
    for path in shown.paths:
        print(f"  {path.suffix[1:]:<18} {path}")
    print(f"  metrics            {output_dir / 'metrics.jsonl'}   tensorboard --logdir {output_dir / 'logs'}")
    print(f"  model              {output_dir / 'final'}")
