"""The package as a wheel installs it: commands that work in any folder, without the checkout."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, clean_environment

from mobius_train.commands import FILES, SCRIPTS
from mobius_train.shared_files import found_anywhere

# Not commands: what they import, what Slurm scripts call, and a page's generator.
NO_COMMANDS = {"_environment", "record_failure", "scaling_table"}


def test_every_tool_is_a_command() -> None:
    scripts = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert set(SCRIPTS.values()) == scripts - NO_COMMANDS
    installed = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for name in (*SCRIPTS, "mobius-train", "mobius-files"):
        assert f'{name} = "mobius_train.commands:main"' in installed


def test_embedded_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"train": "assets/a-*.tar", "other": ["my/assets/b", 3]}
    monkeypatch.chdir(REPOSITORY)
    assert found_anywhere(values) == values
    monkeypatch.chdir(tmp_path)
    assert found_anywhere(values) == {"train": f"{REPOSITORY}/assets/a-*.tar", "other": ["my/assets/b", 3]}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel, and with the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build writes into its folder.
    for name in ("mobius_train", "assets", "configs", "ds_configs", "slurm", "tools"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "constraints.txt"):
        shutil.copyfile(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir")
    subprocess.run([*pip, *build, str(folder), str(source)], check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], check=True)
    for script in (packages / "bin").iterdir():
        text = script.read_text(encoding="utf-8").split("\n", 1)[1]
        (environment / "bin" / script.name).write_text(f"#!{environment / 'bin' / 'python'}\n{text}", encoding="utf-8")
        (environment / "bin" / script.name).chmod(0o755)
    # Behind the wheel on the path, and without the hooks of this environment's editable installation.
    paths = [path for path in site.getsitepackages() if "site-packages" in path]
    (packages / "dependencies.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return environment / "bin"


def typed(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(HF_HUB_OFFLINE="1") | {"PYTHONPATH": ""}
    return subprocess.run(
        [str(installed / command[0]), *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.distributed
def test_the_commands_work_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    for name in ("mobius-train", "mobius-plan"):
        shown = typed(installed, tmp_path, name, "--help")
        assert shown.returncode == 0, (name, shown.stderr)
        assert shown.stdout.startswith("usage: mobius"), name
    dry = typed(installed, tmp_path, "mobius-train", "--dry-run", "data.cache_dir=null", "data.validation=null")
    assert dry.returncode == 0, dry.stderr[-2000:]
    assert "nothing was written" in dry.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_the_files_are_copied_once(installed: Path, tmp_path: Path) -> None:
    copied = typed(installed, tmp_path, "mobius-files", "mine")
    assert copied.returncode == 0, copied.stderr
    for name in FILES:
        ours = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / name).rglob("*") if path.is_file()}
        theirs = {str(path.relative_to(tmp_path / "mine")) for path in (tmp_path / "mine" / name).rglob("*")}
        assert {path for path in ours if "__pycache__" not in path} <= theirs
    again = typed(installed, tmp_path, "mobius-files", "mine")
    assert again.returncode == 1
    assert "not overwritten" in again.stderr
    assert "usage: mobius-files FOLDER" in typed(installed, tmp_path, "mobius-files").stderr
