"""The trackers of a recipe's report_to, and the runs that they go on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from mobius_train.errors import MobiusError
from mobius_train.files import read_small_json, replace_file
from mobius_train.metrics.trackers.followers import Followers
from mobius_train.metrics.trackers.tracker import About, Tracker
from mobius_train.run_files import METRICS, TRACKER_RUNS

logger = logging.getLogger(__name__)


# A tracker's client is imported only if it is used: it takes seconds, and is not always installed.
def _tensorboard(about: About, known: str | None) -> Tracker:
    from mobius_train.metrics.trackers.tensorboard import TensorBoard

    return TensorBoard(about, known)


def _wandb(about: About, known: str | None) -> Tracker:
    from mobius_train.metrics.trackers.weights_and_biases import WeightsAndBiases

    return WeightsAndBiases(about, known)


def _mlflow(about: About, known: str | None) -> Tracker:
    from mobius_train.metrics.trackers.mlflow import Mlflow

    return Mlflow(about, known)


# By the word in report_to, which is also the name of the package.
TRACKERS: dict[str, Callable[[About, str | None], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def check_trackers(names: Iterable[str]) -> None:
    """
    Raises:
        MobiusError: the client of a tracker is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise MobiusError(
                f"report_to={name}, but the package {name} is not installed: pip install 'mobius-train[{name}]', or"
                f" remove {name} from report_to"
            )


def open_followers(names: Iterable[str], about: About) -> Followers:
    """Open the trackers of a run.

    A resumed run goes on without a tracker that cannot be opened; its training is not lost for it.

    Raises:
        MobiusError: a tracker of a new run cannot be opened.
    """
    known = _known(about.folder / TRACKER_RUNS) if about.first_step else {}
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = TRACKERS[name](about, known.get(name))
        # Their clients document no errors.
        except Exception as error:
            problem = f"report_to={name}: it cannot be opened: {type(error).__name__}: {error}"
            if not about.first_step:
                raise MobiusError(f"{problem}. Correct this, or remove {name} from report_to") from error
            logger.error("%s. The run goes on without this tracker; metrics.jsonl has all metrics", problem)
    identities = known | {name: tracker.identity for name, tracker in opened.items() if tracker.identity}
    if identities != known:
        _store(about.folder / TRACKER_RUNS, identities)
    return Followers(opened)


def where_to_look(names: Iterable[str], logs: Path) -> str:
    """Where a person finds what the trackers have recorded."""
    places = {"tensorboard": f"tensorboard --logdir {logs}", "wandb": "Weights & Biases", "mlflow": "MLflow"}
    return ", ".join(places[name] for name in dict.fromkeys(names)) or METRICS


def _known(path: Path) -> dict[str, str]:
    """The identities of an earlier start; {} without a readable file, which costs no more than a new run there."""
    values: object = None
    with suppress(OSError, ValueError, RecursionError):
        values = read_small_json(path)
    found = values if isinstance(values, dict) else {}
    return {name: value for name, value in found.items() if name in TRACKERS and isinstance(value, str)}


def _store(path: Path, identities: dict[str, str]) -> None:
    try:
        replace_file(path, json.dumps(identities) + "\n")
    except OSError as error:
        raise MobiusError(f"cannot write {path}: {error.strerror or error}") from error
