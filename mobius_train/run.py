"""One run from its configuration to its results: assemble the parts, resume, train, report."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from mobius_train.assembly.parts import frozen_hash_in
from mobius_train.assembly.weights import WeightSource
from mobius_train.checkpoint.accepted import Accepted
from mobius_train.checkpoint.format import STATE
from mobius_train.checkpoint.resume import find, how_to_go_on, is_of_another_run, resume
from mobius_train.checkpoint.saver import Identity, Retention, Saver
from mobius_train.config import RunConfig
from mobius_train.convert.init_from import InitFrom
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.protocol import Engine
from mobius_train.engine.spread import Spread
from mobius_train.errors import Interrupted, MobiusError
from mobius_train.files import replace_file
from mobius_train.hub import check_login, make_repository, push_folder
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import be_deterministic
from mobius_train.job.quiet import quiet_libraries
from mobius_train.job.run_folder import RunFolder
from mobius_train.job.run_lock import RunLock
from mobius_train.job.stop import Stop
from mobius_train.job.versions import versions
from mobius_train.metrics.trackers.followers import Followers
from mobius_train.metrics.trackers.open_trackers import check_trackers, open_followers
from mobius_train.metrics.trackers.tracker import About
from mobius_train.metrics.weight_change import WeightChange
from mobius_train.overview import overview
from mobius_train.preflight import preflight
from mobius_train.recipe_files import by_dotted_name
from mobius_train.run_files import FINAL, OVERVIEW, RECIPE
from mobius_train.summary import summary
from mobius_train.tasks.build_task import build_task
from mobius_train.tasks.task import Task
from mobius_train.trainer import Progress, Trainer, micro_batch
from mobius_train.yaml_files import dump_yaml

logger = logging.getLogger(__name__)

Begin = Callable[[Engine], None]


def train(config: RunConfig, spread: Spread) -> None:
    """Train, and print the paths of the results."""
    stop = Stop()
    # The outermost context: whatever a signal interrupts is cleaned up.
    with stop.listening():
        _train(config, spread, stop)


def _train(config: RunConfig, spread: Spread, stop: Stop) -> None:
    quiet_libraries()
    if config.deterministic:
        be_deterministic()
    limits = config.time_limits.model_dump()
    with Distributed(spread.launch, limits=limits) as distributed:
        run_training(config, spread, distributed, stop)
        # All ranks end together, because srun kills the others a few seconds after the first.
        distributed.barrier()


def run_training(
    config: RunConfig,
    spread: Spread,
    distributed: Distributed,
    stop: Stop,
    weights: WeightSource | None = None,
    begin: Begin | None = None,
) -> int:
    """Train a run to its end on ranks that have joined, and print the paths of the results. All ranks call it.

    Args:
        stop: marks a stop in the run's folder, unless it marks one in another folder already.
        weights: the source of the models; default: the recipe's pretrained models.
        begin: gives the engine of a run without a checkpoint further state.

    Returns:
        The number of its steps.

    Raises:
        MobiusError: the run cannot be trained.
        Stopped: a rank was asked to stop.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        distributed.watch.enter("start", "the checks before the start")
        make_engine = choose_engine(config, spread)
        distributed.on_main(lambda: check_reports(config))
        name = config.resume_from_checkpoint
        own = None if name is None or is_of_another_run(config.output_dir, name) else name
        output_dir, lock = claim(config.output_dir, own, distributed, stack)
        config = config.model_copy(update={"output_dir": output_dir})
        repository = distributed.on_main(lambda: _repository(config))
        if not stop.watches:
            stack.enter_context(marked(stop, output_dir, distributed.is_main))
        if distributed.world_size > 1:
            planned = _preflight(config, spread, output_dir, distributed)
        else:
            planned = _planned(config, spread, distributed)
        folder = None if name is None else find(output_dir, name, distributed)
        distributed.watch.enter("start", "loading models and data")
        stack.enter_context(_explained_out_of_memory(config, spread, distributed))
        task = _build_task(config, distributed, weights)
        # Also of a resumed run: a checkpoint is loaded later, and the seed gives new layers the same weights again.
        change = WeightChange((name, p) for name, p in task.trained.named_parameters() if p.requires_grad)
        of_task = task.overview
        engine = make_engine(task.trained, task.units, distributed)
        config, progress, identity = _resumed(folder, config, task, engine, distributed)
        if folder is None and begin is not None:
            begin(engine)
        engine_text, done = spread.describe(config), progress.step
        lines = overview(config, engine_text, distributed, output_dir, of_task, task.epoch, done, planned)
        # Before the data, whose preparation can take hours.
        followers = _announced(config, output_dir, lines, done, distributed, stack)
        task.prepare_data()
        distributed.watch.enter("start", "the start of the training")
        # It marks a run that has begun, so it is written only after all input has been checked.
        if distributed.is_main:
            _write_text(output_dir / RECIPE, identity.config)
        distributed.barrier()
        retention = Retention(config.checkpoints_total_limit, config.checkpoints_keep_every)
        with Saver(output_dir, engine, identity, retention, distributed) as saver:
            trainer = Trainer(
                config=config,
                task=task,
                engine=engine,
                distributed=distributed,
                output_dir=output_dir,
                progress=progress,
                saver=saver,
                stop=stop,
                weight_change=change,
                lock=lock,
                followers=followers,
                planned_gb=None if planned is None else planned / 1e9,
            )
            shown = trainer.train()
        engine.close()
        if distributed.is_main:
            seconds = time.monotonic() - started
            told = summary(config, output_dir, shown.paths, shown.figures, seconds, distributed.peak_memory_gb())
            print(f"\n{told}")
    # The run is over: a push that fails makes neither it nor its trackers failed.
    if repository is not None:
        distributed.watch.enter("export", f"pushing to {repository}")
        distributed.on_main(lambda: _push(output_dir / FINAL, repository))
    return config.steps


def check_nodes(config: RunConfig, spread: Spread) -> None:
    """Run only the preflight. Leaves no files."""
    quiet_libraries()
    with Distributed(spread.launch) as distributed:
        choose_engine(config, spread)
        _preflight(config, spread, config.output_dir, distributed)


def dry_run(config: RunConfig, spread: Spread) -> None:
    """Load, check and run one forward and backward pass. Writes nothing."""
    quiet_libraries()
    if config.deterministic:
        be_deterministic()
    with Distributed(spread.launch, limits=config.time_limits.model_dump()) as distributed:
        try_micro_batch(config, spread, distributed)


def try_micro_batch(config: RunConfig, spread: Spread, distributed: Distributed) -> None:
    """Run one forward and backward pass on ranks that have joined. All ranks call it. Writes nothing.

    Raises:
        MobiusError: the recipe cannot be trained.
    """
    make_engine = choose_engine(config, spread)
    distributed.on_main(lambda: check_reports(config))
    distributed.watch.enter("start", "the dry run")
    with _explained_out_of_memory(config, spread, distributed):
        task = _build_task(config, distributed)
        engine = make_engine(task.trained, task.units, distributed)
        if config.data.cache_required:
            # Opens the cache, and computes nothing.
            task.prepare_data()
        loss = micro_batch(task, engine, next(task.training_batches(0)))
        mean = distributed.mean({"loss": float(loss)})["loss"]
    engine.close()
    if distributed.is_main:
        trained = _count(task, True)
        print(
            f"dry run: {config.stage}, {trained / 1e6:.2f}M trained parameters on {distributed.world_size} rank(s),"
            f" loss of one micro-batch {mean:.4f},"
            f" peak memory {distributed.peak_memory_gb():.2f} GB; nothing was written"
        )


def _preflight(config: RunConfig, spread: Spread, output_dir: Path, distributed: Distributed) -> int | None:
    ready = preflight(config, spread, output_dir, distributed)
    if distributed.is_main:
        print(ready.line, flush=True)
    return ready.planned


def check_reports(config: RunConfig) -> None:
    """Check what a run is reported to. Changes nothing there.

    Raises:
        MobiusError: the client of a tracker is not installed, or final/ cannot be pushed to the hub.
    """
    check_trackers(config.report_to)
    if config.hub_model_id is not None:
        check_login(config.hub_model_id)


def _repository(config: RunConfig) -> str | None:
    return None if config.hub_model_id is None else make_repository(config.hub_model_id, config.hub_private_repo)


def _push(final: Path, repository: str) -> None:
    """Push final/ after all else, so that a failure costs nothing but an exit status that is not 0."""
    try:
        print(f"\npushed to {push_folder(final, repository)}", flush=True)
    except MobiusError as error:
        raise MobiusError(
            f"{error}. The run is finished and its model is in {final}. Push it with: python tools/push_to_hub.py"
            f" {shlex.quote(str(final))} --repository {repository}"
        ) from error


def _build_task(config: RunConfig, distributed: Distributed, weights: WeightSource | None = None) -> Task:
    """Build the task from given weights, or from those that the recipe names."""
    if weights is not None or config.init_from is None:
        return build_task(config, distributed, weights)
    start = InitFrom(config)
    task = build_task(config, distributed, start)
    if distributed.is_main:
        print(f"starts from {start.description}", flush=True)
    return task


def _resumed(
    folder: Path | None, recipe: RunConfig, task: Task, engine: Engine, distributed: Distributed
) -> tuple[RunConfig, Progress, Identity]:
    """Load the checkpoint of this folder into the engine; None: the run is new.

    Returns:
        The recipe with its number of steps, the progress, and the identity of later checkpoints.
    """
    config = recipe.with_steps(task.epoch, distributed.world_size)
    identity = _identity(config, task, distributed)
    if folder is None:
        return config, Progress(), identity
    frozen_hash = partial(frozen_hash_in, config)
    progress = _progress(folder, resume(folder, engine, identity, distributed, Accepted.of(config), frozen_hash))
    config = recipe.with_steps(task.epoch, distributed.world_size, progress.step, progress.samples_seen)
    if distributed.is_main:
        print(f"resumed from {folder}: step {progress.step} of {config.steps}", flush=True)
    return config, progress, replace(identity, config=config.dump())


def _announced(
    config: RunConfig, output_dir: Path, lines: str, first_step: int, distributed: Distributed, stack: ExitStack
) -> Followers | None:
    """Print and write the overview, and start the trackers on rank 0, until the stack is left."""
    if distributed.is_main:
        print(f"\n{lines}\n", flush=True)
        _write_text(output_dir / OVERVIEW, lines + "\n")
    recipe, opened = config.public_values(), []

    def open_all() -> None:
        about = About(output_dir, by_dotted_name(recipe), dump_yaml(recipe), lines, first_step)
        opened.append(stack.enter_context(open_followers(config.report_to, about)))

    distributed.on_main(open_all)
    return opened[0] if opened else None


def _planned(config: RunConfig, spread: Spread, distributed: Distributed) -> int | None:
    """The planned peak of what torch allocates on this GPU, in bytes; None without a plan."""
    if distributed.device.type != "cuda" or not config.check_memory:
        return None
    # These imports take a second, which a start on a CPU does not need.
    from mobius_train.plan.planner import plan

    try:
        return plan(config, spread).allocated
    # A figure for comparison: whatever a plan fails on must not end a run that would train.
    except Exception as error:
        logger.warning("this recipe cannot be planned, so no planned memory is recorded: %s", error)
        return None


def _count(task: Task, trained: bool) -> int:
    return sum(p.numel() for p in task.trained.parameters() if p.requires_grad == trained)


def claim(pattern: Path, resume: str | None, distributed: Distributed, stack: ExitStack) -> tuple[Path, RunLock | None]:
    """Return the output folder, which is this job's alone until the stack is left, and on rank 0 its lock.

    All ranks call it; see `RunFolder` for the arguments.

    Raises:
        MobiusError: see `RunFolder`.
    """
    locks: list[RunLock] = []

    def enter() -> Path:
        place = stack.enter_context(RunFolder(pattern, resume))
        locks.append(place.lock)
        return place.path

    return distributed.on_main(enter), locks[0] if locks else None


@contextmanager
def marked(stop: Stop, output_dir: Path, looks: bool) -> Iterator[None]:
    """Context that marks the folder after a request to stop which came before the first step.

    Args:
        looks: see `Stop.watch`.
    """
    try:
        stop.watch(output_dir, looks)
        yield
    except Interrupted as reason:
        stop.done(0)
        print(f"\nstopped before the first step on request ({reason})", flush=True)
        raise


@contextmanager
def _explained_out_of_memory(config: RunConfig, spread: Spread, distributed: Distributed) -> Iterator[None]:
    """Context that turns an error of a full memory into a MobiusError with a remedy."""
    try:
        yield
    except RuntimeError as error:
        # These imports take a second, which other runs do not need.
        from mobius_train.plan.out_of_memory import explain_out_of_memory, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        explained = explain_out_of_memory(error, distributed.watch.doing, config, spread)
        go_on = how_to_go_on(config, config.output_dir)
        raise MobiusError(f"{explained}. If there is a checkpoint, {go_on}") from error


def _progress(folder: Path, counters: dict[str, int]) -> Progress:
    try:
        return Progress(**counters)
    except TypeError as error:
        raise MobiusError(f"{folder / STATE}: not the progress of a run ({error})") from error


def _identity(config: RunConfig, task: Task, distributed: Distributed) -> Identity:
    return Identity(
        config=config.dump(),
        global_batch_size=config.samples_per_step(distributed.world_size),
        frozen_sha256=task.frozen_hash,
        frozen_source=config.pretrained_model_name_or_path if task.frozen_hash else None,
        versions=versions(),
        data=task.data_identity,
    )


def _write_text(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise MobiusError(f"cannot write {path}: {error.strerror or error}") from error
