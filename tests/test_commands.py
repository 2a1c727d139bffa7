"""The package as a wheel installs it: commands that work in any folder, without the checkout."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import REPOSITORY, clean_environment

from mobius_train import commands, main
from mobius_train.commands import FILES, SCRIPTS, load_tool
from mobius_train.shared_files import found_anywhere

# Not commands: what they import, what Slurm scripts call, and a page's generator.
NO_COMMANDS = {"_environment", "record_failure", "scaling_table"}


def test_every_tool_is_a_command() -> None:
    scripts = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert set(SCRIPTS.values()) == scripts - NO_COMMANDS
    installed = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for name in (*SCRIPTS, "mobius-train", "mobius-files"):
        assert f'{name} = "mobius_train.commands:main"' in installed


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    tools = [path for path in sorted((REPOSITORY / "tools").glob("*.py")) if path.stem != "_environment"]
    found = {path.stem: load_tool(path).make_parser() for path in tools}
    return found | {"main": main.make_parser(), "files": commands.make_parser()}


def without_help(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helped = {choice.dest for choice in action._choices_actions if choice.help}
            yield from (f"{name} {command}" for command in action.choices if command not in helped)
            for command, inner in action.choices.items():
                yield from without_help(inner, f"{name} {command}")
        elif not action.help:
            yield f"{name} {action.dest}"


def test_every_option_has_a_help_text(parsers: dict[str, argparse.ArgumentParser]) -> None:
    assert len(parsers) == len(SCRIPTS) + 2 + len(NO_COMMANDS - {"_environment"})
    assert [lack for name, parser in parsers.items() for lack in without_help(parser, name)] == []
    for parser in parsers.values():
        # A % that is no format would fail here.
        assert parser.format_help().startswith("usage: ")


def test_an_option_without_a_help_text_is_found() -> None:
    parser = argparse.ArgumentParser()
    inner = parser.add_subparsers().add_parser("inner")
    inner.add_argument("--told", help="what it does")
    inner.add_argument("--untold")
    assert list(without_help(parser, "tool")) == ["tool inner", "tool inner untold"]


SLOW_IMPORTS = {"torch", "numpy", "diffusers", "transformers", "deepspeed", "accelerate", "PIL", "av"}
SHOW_HELP = """
import contextlib, io, json, os, runpy, sys
os._exit = sys.exit  # by which commands that join a job leave
scripts, shown = sys.argv[1:], []
for script in scripts:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    shown.append([out.getvalue()[:6], sorted(name for name in sys.modules if "." not in name)])
print(json.dumps(shown))
"""


@pytest.mark.distributed
def test_help_is_shown_without_the_imports_that_take_seconds() -> None:
    tools = [path for path in sorted((REPOSITORY / "tools").glob("*.py")) if path.stem != "_environment"]
    command = [sys.executable, "-c", SHOW_HELP, *map(str, tools), str(REPOSITORY / "mobius_train" / "main.py")]
    environment = clean_environment(PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tools'}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert [text for text, _ in shown] == ["usage:"] * (len(tools) + 1)
    assert [SLOW_IMPORTS.intersection(modules) for _, modules in shown] == [set()] * len(shown)
    # The control: what a recipe's parser needs is found.
    assert {"pydantic", "yaml"} <= set(shown[-1][1])


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
    for name in (*SCRIPTS, "mobius-train", "mobius-files"):
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
    scripts = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "mine" / "slurm").iterdir())
    outputs = re.findall(r"^#SBATCH --output=(\S+)/", scripts, re.MULTILINE)
    assert [(tmp_path / "mine" / output).is_dir() for output in outputs] == [True] * 5, "Slurm makes no folder"
    again = typed(installed, tmp_path, "mobius-files", "mine")
    assert again.returncode == 1
    assert "not overwritten" in again.stderr
    assert "usage: mobius-files" in typed(installed, tmp_path, "mobius-files").stderr
    assert typed(installed, tmp_path, "mobius-files", "--help").returncode == 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mobius-train mixed_pr", ["mixed_precision="]),
        ("mobius-train --engine ", ["deepspeed", "fsdp"]),
        ("mobius-convert from-im", ["from-image-model"]),
        ("mobius-sample --prompt a --nothing", []),
    ],
)
def test_shells_complete_commands(line: str, expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete", reason="argcomplete is not installed: pip install argcomplete")
    command = line.split()[0]
    # As a shell with argcomplete asks.
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}
    # The shell's line counts. Without argcomplete this would show the help.
    code = f"import sys; sys.argv = [{command!r}, '--help']; from mobius_train.commands import main; main()"
    subprocess.run([sys.executable, "-c", code], env=clean_environment(**asked), check=True)
    assert (tmp_path / "out").read_text().split() == expected
