from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY, clean_environment

from mobius_train.errors import MobiusError
from mobius_train.main import make_parser
from mobius_train.stages.recipe import read_stages

SCRIPTS = [*sorted((REPOSITORY / "slurm").glob("*.sh")), REPOSITORY / ".ci" / "run"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout.decode()


# Stand-ins for Slurm's programs. The trainer asks for a stop as Slurm does, waits for it, and writes what it was given.
SRUN = """\
while [[ $1 == --* ]]; do shift; done
shift 2
printf '%s\\n' "$@" > "$RECORD"
kill -USR1 "$PPID"
for _ in {1..100}; do [[ -e $FOLDER/stop ]] && exit 75; sleep 0.1; done
exit 1
"""
PROGRAMS = {
    "srun": SRUN,
    "scontrol": 'if [[ $1 == show ]]; then echo n1; else printf "%s\\n" "$@" > "$RECORD.scontrol"; fi',
}
PROGRAMS |= {"squeue": "echo RUNNING", "python": 'printf "%s\\n" "$@" > "$RECORD.failure"'}
HOSTILE = [
    "$(touch hacked)",
    "`touch hacked`",
    '"; touch hacked; "',
    "'; touch hacked; '",
    "-n",
    "--",
    "a b",
    "a: b # c",
]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x01b", "a\tb", "a\x85b", "a\u2028b"])
@pytest.mark.parametrize("of", ["job", "folder"])
def test_a_name_that_yaml_reads_as_another_is_refused(name: str, of: str, tmp_path: Path) -> None:
    """The run would be in another folder than the one in which the script asks it to stop."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NAME": name if of == "job" else "mobius", "SLURM_JOB_ID": "7"}
    result = subprocess.run(
        ["bash", "slurm/train_parallel.sh", *([] if of == "job" else [f"output_dir={name}"])],
        cwd=tmp_path,
        env=clean_environment(**job),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "contains a control character" in result.stderr


def run_script(script: str, *arguments: str, folder: Path, job: str, output: str) -> list[str]:
    """Run a script of slurm/ with the stand-ins, in `folder`; returns the arguments that the training got.

    Args:
        job: name of the job.
        output: the run's folder, in which the script asks for a stop.
    """
    (folder / "bin").mkdir()
    for program, text in PROGRAMS.items():
        (folder / "bin" / program).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / program).chmod(0o755)
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    variables = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NAME": job,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_CPUS_ON_NODE": "2",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "RECORD": str(folder / "record"),
        "FOLDER": output,
    }
    result = subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=folder,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 75, result.stdout + result.stderr
    module, *given = (folder / "record").read_text().splitlines()
    assert module == "mobius_train.main"
    return given


@pytest.mark.distributed
def test_the_recipe_has_the_mode_of_train_parallel(tmp_path: Path) -> None:
    asked = ("--stages", str(REPOSITORY / "configs" / "vchitect_stages.yaml"))
    arguments = {}
    for script in ("train_parallel.sh", "train_serial.sh"):
        (tmp_path / script).mkdir()
        given = run_script(script, *asked, folder=tmp_path / script, job="mobius", output="runs/mobius-7")
        arguments[script] = make_parser().parse_args(given)
    parallel, serial = arguments.values()
    stages = read_stages(parallel.stages, parallel.overrides)
    assert {stage.config.mode for stage in stages.recipes} == {"full"}
    with pytest.raises(MobiusError, match="mode=serial"):
        read_stages(serial.stages, serial.overrides)


@pytest.mark.distributed
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("of", ["job", "folder"])
def test_names_are_never_run_and_the_stop_reaches_the_run(name: str, of: str, tmp_path: Path) -> None:
    folder = f"runs/{name}-7" if of == "job" else name
    job, arguments = (name, []) if of == "job" else ("mobius", [f"output_dir={name}"])
    record = run_script("train_parallel.sh", *arguments, folder=tmp_path, job=job, output=folder)
    assert not list(tmp_path.rglob("hacked"))
    (given,) = [argument.partition("=")[2] for argument in record if argument.startswith("output_")]
    assert yaml.safe_load(given) == folder
    # The stand-in does not mark its stop, so this is a failure to record.
    assert (tmp_path / "record.failure").read_text().splitlines()[-2:] == ["--", folder]
    assert (tmp_path / "record.scontrol").read_text() == "requeue\n7\n"
