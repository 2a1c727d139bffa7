"""Train all stages by one command, and go on with them by the same command."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from mobius_train.checkpoint.folders import pointed
from mobius_train.checkpoint.format import NAME, step_of
from mobius_train.checkpoint.resume import AUTO
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.files import temporary_of
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import be_deterministic
from mobius_train.job.quiet import quiet_libraries
from mobius_train.job.stop import Stop
from mobius_train.run import claim, marked, run_training, try_micro_batch
from mobius_train.stages.check import check_stages, naming
from mobius_train.stages.recipe import StageRecipe, Stages
from mobius_train.stages.record import FINAL, Record
from mobius_train.stages.start import AfterStage, config_after, keep_optimizer_state, last_checkpoint


def train_stages(stages: Stages, spread: Spread) -> None:
    """Train the stages that are not finished, each from the one before it.

    All stages are checked before the first step. output_dir/final becomes a link to the last stage's.

    Raises:
        MobiusError: a stage cannot be trained, or a finished one was changed; the message names it.
        Stopped: there was a request to stop. The same command goes on.
    """
    stop = Stop()
    # The outermost context: whatever a signal interrupts is cleaned up.
    with stop.listening(), _joined(stages, spread) as distributed, ExitStack() as stack:
        output_dir, _ = claim(stages.output_dir, AUTO, distributed, stack)
        stack.enter_context(marked(stop, output_dir, distributed.is_main))
        done = distributed.on_main(lambda: Record(output_dir).finished(stages))
        if done < len(stages.recipes):
            check_stages(stages, spread, distributed, done)
        for stage in stages.recipes[done:]:
            if stage.number > done + 1:
                stop.defer_no_more()
            _train_stage(stage, stages, output_dir, spread, distributed, stop)
            _release(distributed)
        distributed.on_main(lambda: _link_final(output_dir, stages.recipes[-1]))
        if distributed.is_main:
            print(f"\nall {len(stages.recipes)} stages are finished; the model is {output_dir / FINAL}", flush=True)
        distributed.barrier()


def check_nodes_of_stages(stages: Stages, spread: Spread) -> None:
    """Run only the checks of all stages. Leaves no files."""
    with _joined(stages, spread) as distributed:
        check_stages(stages, spread, distributed)


def dry_run_stages(stages: Stages, spread: Spread) -> None:
    """Check all stages, and run a forward and backward pass of each with the base recipe's model. Writes nothing."""
    with _joined(stages, spread) as distributed:
        check_stages(stages, spread, distributed)
        for stage in stages.recipes:
            if distributed.is_main:
                print(f"\n{stage}", flush=True)
            with naming(stage):
                try_micro_batch(stage.config, spread, distributed)
            _release(distributed)


@contextmanager
def _joined(stages: Stages, spread: Spread) -> Iterator[Distributed]:
    quiet_libraries()
    configs = [stage.config for stage in stages.recipes]
    if any(config.deterministic for config in configs):
        be_deterministic()
    with Distributed(spread.launch, limits=configs[0].time_limits.model_dump()) as distributed:
        distributed.watch.enter("start", "the checks of all stages")
        yield distributed


def _train_stage(
    stage: StageRecipe, stages: Stages, output_dir: Path, spread: Spread, distributed: Distributed, stop: Stop
) -> None:
    before = stages.recipes[stage.number - 2] if stage.number > 1 else None
    distributed.watch.judge_by(stage.config.time_limits.model_dump())
    distributed.watch.enter("start", f"the start of {stage}")
    if distributed.is_main:
        print(f"\n{stage}, {stage.number} of {len(stages.recipes)}", flush=True)
    with naming(stage), _with_changes(stage, output_dir, distributed):
        config = config_after(stage, before, output_dir)
        weights, begin = None, None
        if before is not None:
            averaged = stage.start_from == "average"
            checkpoint = last_checkpoint(before, output_dir, distributed)
            weights = AfterStage(before.config, checkpoint, averaged)
            if stage.optimizer_state == "kept":
                begin = partial(keep_optimizer_state, checkpoint=checkpoint, averaged=averaged)
        distributed.on_main(lambda: Record(output_dir).begin(stage))
        steps = run_training(config, spread, distributed, stop, weights, begin)
        distributed.on_main(lambda: _finish(stage, output_dir, steps))


@contextmanager
def _with_changes(stage: StageRecipe, output_dir: Path, distributed: Distributed) -> Iterator[None]:
    """Context whose errors list what was changed in the stage since its first start, the likely reason."""
    try:
        yield
    except MobiusError as error:
        changes = Record(output_dir).changes(stage) if distributed.is_main else []
        if changes:
            raise MobiusError(f"{error}\nchanged since the stage began: {'; '.join(changes)}") from error
        raise


def _finish(stage: StageRecipe, output_dir: Path, steps: int) -> None:
    newest = pointed(output_dir / stage.folder) or ""
    if not NAME.fullmatch(newest) or step_of(Path(newest)) < steps:
        raise MobiusError(
            "its last checkpoint was not saved (see above), and the next stage starts from it: free space, then start"
            " the same command again"
        )
    Record(output_dir).finish(stage)


def _link_final(output_dir: Path, last: StageRecipe) -> None:
    link = temporary_of(output_dir / FINAL)
    try:
        link.symlink_to(Path(last.folder, FINAL))
        link.replace(output_dir / FINAL)
    except OSError as error:
        link.unlink(missing_ok=True)
        raise MobiusError(f"cannot write {output_dir / FINAL}: {error.strerror or error}") from error


def _release(distributed: Distributed) -> None:
    """Free the memory of the stage before, and count the peak anew."""
    # Engines refer to themselves.
    gc.collect()
    if distributed.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(distributed.device)
