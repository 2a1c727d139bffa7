"""Saving of checkpoints during training.

Training only waits while each rank copies its share to host memory. A thread on each rank then writes, hashes and syncs
its files in the temporary folder. The threads use no collectives, because collectives need the same order on all ranks.
Instead, the main threads check at step boundaries whether all ranks have written. A thread on rank 0 then writes the
manifest and publishes the checkpoint. If a rank failed, all ranks log the error, and training continues without it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mobius_train.checkpoint import folders, random_states
from mobius_train.checkpoint.format import CONFIG, MANIFEST, STATE, Manifest, State, random_file, shard_file
from mobius_train.checkpoint.shard import PinnedCopy
from mobius_train.engine.protocol import Engine
from mobius_train.files import File, remove_any, write_file
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)

Files = dict[str, File]


@dataclass(frozen=True)
class Identity:
    """The values that all checkpoints of a run share; see `State` for the fields."""

    config: str
    """The resolved recipe, as YAML."""
    global_batch_size: int
    frozen_sha256: str
    frozen_source: str | None
    versions: dict[str, str]
    data: dict[str, str] | None = None


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep: the newest `total_limit` (None: all), and all at multiples of `keep_every` steps."""

    total_limit: int | None = None
    keep_every: int | None = None


@dataclass
class _Save:
    """A save in progress: first all ranks write, then rank 0 publishes."""

    step: int
    work: Future[Files]
    publishing: bool = False


class Saver:
    """Writes checkpoints of an engine in the background, one at a time.

    All ranks call all methods at the same step. As a context manager it waits for the last save on exit. After an
    error, which may affect only one rank, a job with several ranks waits only for its own threads.
    """

    def __init__(
        self, output_dir: Path, engine: Engine, identity: Identity, retention: Retention, distributed: Distributed
    ) -> None:
        self._output_dir, self._engine, self._distributed = output_dir, engine, distributed
        self._identity, self._retention = identity, retention
        self._host = PinnedCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self.saved: int | None = None
        """The step of the last checkpoint that this object has published."""
        if distributed.is_main:
            folders.remove_leftovers(output_dir)
        distributed.barrier()

    def save(self, progress: dict[str, Any]) -> float:
        """Start writing checkpoint-<progress["step"]>; return the seconds that training waited."""
        started = time.perf_counter()
        self._distributed.watch.enter("save", f"saving checkpoint-{progress['step']}")
        self.wait()
        self._host.take(self._engine.pieces())
        rank, ranks = self._distributed.rank, self._distributed.world_size
        texts = {random_file(rank, ranks): json.dumps(random_states.take())}
        if self._distributed.is_main:
            texts |= {STATE: self._state(progress).dump(), CONFIG: self._identity.config}
        step = progress["step"]
        folder = folders.temporary_of(self._output_dir, step)
        self._save = _Save(step, self._thread.submit(self._write, folder, shard_file(rank, ranks), texts))
        return time.perf_counter() - started

    def poll(self) -> None:
        """Publish a save once all ranks have written it. Call it at step boundaries."""
        if self._save is not None:
            busy = self._distributed.mean({"busy": float(not self._save.work.done())})["busy"]
            if busy == 0:
                self._advance(self._save)

    def wait(self) -> None:
        """Wait until no save is in progress."""
        while self._save is not None:
            self._distributed.watch.enter("save", f"waiting for checkpoint-{self._save.step}")
            self._advance(self._save)

    def _advance(self, save: _Save) -> None:
        """Collect the outcome of every rank, then start the next phase or report failures."""
        outcomes = self._distributed.gather_objects(_outcome(save.work))
        failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        self._save = None
        if failures:
            logger.error("checkpoint-%d was not saved, training continues: %s", save.step, "; ".join(failures))
            if self._distributed.is_main:
                remove_any(folders.temporary_of(self._output_dir, save.step))
        elif not save.publishing:
            files = {name: file for outcome in outcomes for name, file in outcome.items()}
            act: Callable[..., Files] = self._publish if self._distributed.is_main else _nothing
            self._save = _Save(save.step, self._thread.submit(act, save.step, files), publishing=True)
        else:
            self.saved = save.step

    def _write(self, folder: Path, shard: str, texts: dict[str, str]) -> Files:
        with self._distributed.watch.beside("save", f"writing {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            if folder.is_symlink():
                raise OSError(f"{folder} is a link")
            files = {name: write_file(folder / name, [text.encode()]) for name, text in texts.items()}
            return files | {shard: self._host.write(folder / shard)}

    def _publish(self, step: int, files: Files) -> Files:
        with self._distributed.watch.beside("save", f"publishing checkpoint-{step}"):
            return self._publish_now(step, files)

    def _publish_now(self, step: int, files: Files) -> Files:
        temporary = folders.temporary_of(self._output_dir, step)
        write_file(temporary / MANIFEST, [Manifest(step, files).dump().encode()])
        folders.publish(self._output_dir, step)
        try:
            keep = folders.folder_of(self._output_dir, step)
            folders.prune(self._output_dir, keep, self._retention.total_limit, self._retention.keep_every)
        except OSError as error:
            logger.warning("an old checkpoint was not removed: %s", error)
        return files

    def _state(self, progress: dict[str, Any]) -> State:
        return State(
            progress=progress,
            global_batch_size=self._identity.global_batch_size,
            world_size=self._distributed.world_size,
            contents=self._engine.contents(),
            scalars=self._engine.scalars(),
            frozen_sha256=self._identity.frozen_sha256,
            frozen_source=self._identity.frozen_source,
            versions=self._identity.versions,
            data=self._identity.data,
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or self._distributed.world_size == 1:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)


def _outcome(work: Future[Files]) -> Files | str:
    """Wait for the work; return its files, or an error message, because tracebacks cannot be sent to other ranks."""
    error = work.exception()
    if error is None:
        return work.result()
    return str(error) if isinstance(error, OSError) else repr(error)


def _nothing(step: int, files: Files) -> Files:
    return files
