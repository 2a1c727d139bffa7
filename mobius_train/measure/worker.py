"""The process that `side_by_side` starts: measure, plan, and write the record."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.measure.side_by_side import Job


def main() -> None:
    job, record = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    launch = environment.prepare()
    import torch

    from mobius_train.engine.spread import spread_of
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.job.versions import versions
    from mobius_train.measure.measure import measure
    from mobius_train.measure.versus_plan import as_json, planned

    quiet_libraries()
    try:
        config, recipe = load(Path(job.config), job.overrides), Path(job.config)
        spread = spread_of(
            "fsdp" if job.deepspeed is None else "deepspeed",
            None if job.deepspeed is None else Path(job.deepspeed),
            launch,
        )
        if job.limit_gb is not None:
            share = job.limit_gb * 1e9 / torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        measured = measure(
            config,
            recipe,
            spread,
            warmup=job.warmup,
            steps=job.steps,
            random_models=job.random_models,
            snapshot=None if job.snapshot is None else Path(job.snapshot),
        )
        found = as_json(planned(config, recipe, spread), measured)
    except (MobiusError, torch.OutOfMemoryError) as error:
        record.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        raise MobiusError(str(error)) from error
    engine = {"engine": spread.engine} | ({} if spread.ds_json is None else {"deepspeed": spread.ds_json})
    found |= {"config": config.model_dump(mode="json"), "cores": os.cpu_count()} | engine
    record.write_text(json.dumps(found | {"versions": versions()}), encoding="utf-8")


if __name__ == "__main__":
    run_rank(main)
