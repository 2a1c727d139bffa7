"""MLflow: the server of MLFLOW_TRACKING_URI, or without it a database in logs/."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from mobius_train.job.environment import mlflow_server, tracker_project
from mobius_train.metrics.trackers.tracker import About, Outcome, Sample

# Parameters of one request, and letters of a parameter, that every server takes.
MOST, LONGEST = 100, 500
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow:
    """A resumed run goes on in the same run of MLflow. Steps that are taken again appear twice there."""

    def __init__(self, about: About, known: str | None = None) -> None:
        about.logs.mkdir(parents=True, exist_ok=True)
        server = mlflow_server()
        logs = about.logs.resolve()
        self._client = MlflowClient(server or f"sqlite:///{logs / 'mlflow.db'}")
        if known is not None and self._goes_on(known):
            self.identity = known
        else:
            # Without a server, files would be stored in the folder where the run was started.
            place = None if server else (logs / "mlflow").as_uri()
            self.identity = self._new_run(about, place)
        self._client.log_text(self.identity, about.recipe_text, "config.yaml")
        self._client.set_tag(self.identity, "mlflow.note.content", about.overview)

    def _goes_on(self, known: str) -> bool:
        """Whether the server has the run; it can be another server than before."""
        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _new_run(self, about: About, place: str | None) -> str:
        name = tracker_project("MLFLOW_EXPERIMENT_NAME")
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name, place) if experiment is None else experiment.experiment_id
        identity = str(self._client.create_run(number, run_name=about.name).info.run_id)
        # Only of a new run: MLflow refuses another value of a parameter.
        parameters = [Param(name, json.dumps(value)[:LONGEST]) for name, value in about.recipe.items()]
        for start in range(0, len(parameters), MOST):
            self._client.log_batch(identity, params=parameters[start : start + MOST])
        return identity

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.identity, [Metric(name, value, now, step) for name, value in values.items()])

    def samples(self, step: int, samples: list[Sample]) -> None:
        for sample in samples:
            self._client.log_artifact(self.identity, str(sample.path), f"samples/step-{step}")

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self.identity, STATUS[outcome])
