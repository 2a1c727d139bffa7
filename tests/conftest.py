from __future__ import annotations

import gc
import importlib
import multiprocessing.process
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import LAUNCHER_VARIABLES
from preloaded import HEAVY
from recipes import DS_CONFIGS, Run, recipe, write
from tiny import save_clips, save_pipeline

# Nothing here may reach for a model hub, and models this small gain nothing from threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

STARTS_PROCESSES = ("distributed", "slurm", "gpu")
# Programs of a moment: what a run asks about the machine, and a linter.
SHORT = ("git", "scontrol", "shellcheck", "uname", "which")
_unmarked: list[str] = []


def _refuse(program: str) -> None:
    """Fail the running test if it may not start processes. pytest.fail is no Exception: nothing catches it."""
    if _unmarked and Path(program).name not in SHORT:
        pytest.fail(f"{_unmarked[0]} starts {program}: mark it as distributed")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        _refuse(str(arguments[0]))
    elif event in ("os.fork", "os.posix_spawn"):
        _refuse(event)


sys.addaudithook(_audit)


@pytest.fixture(scope="session", autouse=True)
def _spawned_processes() -> Iterator[None]:
    """multiprocessing's spawn and forkserver raise no audit event."""
    start = multiprocessing.process.BaseProcess.start

    def checked(process: multiprocessing.process.BaseProcess) -> None:
        _refuse(f"the process {process.name}")
        start(process)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", checked)
        yield


def pytest_collection_finish() -> None:
    _freeze()


def _freeze() -> None:
    """Exclude the imported libraries from garbage collection: walking their 800,000 objects takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test without one of the marks STARTS_PROCESSES that starts a process fails: `make check` runs it."""
    if not any(item.get_closest_marker(name) for name in STARTS_PROCESSES):
        _unmarked.append(item.nodeid)
    try:
        return (yield)
    finally:
        _unmarked.clear()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of the emoji layout: unet/, vae/, scheduler/."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_pipeline`, with a text encoder of its own."""
    return save_pipeline(tmp_path_factory.mktemp("small"), "small")


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten GIFs of 4 frames, 32 px, with captions."""
    return save_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of this process alone, for all runs in it: DeepSpeed takes only one in the life of a process."""
    for name in HEAVY:
        importlib.import_module(name)
    _freeze()
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(
    request: pytest.FixtureRequest,
    tiny_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process_group: None,
) -> Run:
    """Train a recipe with changes in this process; returns its output folder."""
    if not any(request.node.get_closest_marker(name) for name in ("slow", *STARTS_PROCESSES)):
        pytest.fail("whole runs take seconds each: mark the test as slow")
    from mobius_train.config import load
    from mobius_train.engine.spread import spread_of
    from mobius_train.job import environment
    from mobius_train.run import dry_run, train

    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def start(name: str = "out", ds_config: str | None = "zero2", dry: bool = False, **changes: Any) -> Path:
        monkeypatch.delenv("MASTER_PORT", raising=False)
        values = recipe(tiny_pipeline, clips_folder, tmp_path / name, **changes)
        config = load(write(tmp_path / f"{name}.yaml", values))
        ds_path = None if ds_config is None else DS_CONFIGS / f"{ds_config}.json"
        engine: Any = "fsdp" if ds_config is None else "deepspeed"
        (dry_run if dry else train)(config, spread_of(engine, ds_path, environment.prepare()))
        return tmp_path / name

    return start


# Programs that playwright can drive.
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): apt-get install chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """An empty tab, with a storage of its own."""
    with browser.new_context() as context:
        context.set_default_timeout(10_000)
        yield context.new_page()


# Whole files go to a worker, in this order. The longest come first, or one worker would end long after the other.
FIRST = ("tests/slurm/", "tests/engine/", "tests/plan/", "tests/runs/", "tests/data/test_bucket", "tests/measure/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=place)
