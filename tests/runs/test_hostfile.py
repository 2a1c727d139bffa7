"""`deepspeed --hostfile` on two hosts without Slurm: this machine, by ssh, under two addresses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import free_port, python
from recipes import DS_CONFIGS, Run, losses, recipe, write

PROGRAMS = ("pdsh", "ssh", "ssh-keygen", "sshd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
HOSTS = ("127.0.0.1", "127.0.0.2")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        any(shutil.which(program, path=PATH) is None for program in PROGRAMS) or os.geteuid() != 0,
        reason="needs root and apt-get install pdsh openssh-server",
    ),
]


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A daemon of this test's own, and the variables under which `ssh` finds it."""
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile {folder}/pid\nPort {port}\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  Port {port}\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    # ssh takes the home folder from the list of users, not from HOME: only an argument can lead it elsewhere.
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    daemon = shutil.which("sshd", path=PATH)
    assert daemon is not None
    with subprocess.Popen([daemon, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL) as process:
        variables = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
        deadline = time.monotonic() + 20
        while subprocess.run([wrapper, HOSTS[1], "true"], check=False).returncode != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield variables
        process.terminate()


def _start(
    folder: Path, recipe_path: Path, variables: dict[str, str], *overrides: str
) -> subprocess.CompletedProcess[str]:
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ("--hostfile", hosts, "--master_port", free_port(), "mobius_train/main.py", "--config", recipe_path)
    engine = ("--deepspeed", DS_CONFIGS / "zero2.json")
    return python(launcher, *options, *engine, *overrides, timeout=240, **variables)


def test_two_hosts_train_as_one_process_does_and_a_mistake_exits_non_zero(
    ssh: dict[str, str], run: Run, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_train_steps": 2, "validation": {"prompts": []}}
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "hosts-run", **options))
    result = _start(tmp_path, path, ssh)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert losses(tmp_path / "hosts-run") == pytest.approx(
        losses(run("alone", train_batch_size=4, **options)), rel=1e-5
    )

    failed = _start(tmp_path, path, ssh, "learning_rat=1")
    assert failed.returncode != 0
    assert "did you mean learning_rate" in failed.stdout + failed.stderr
