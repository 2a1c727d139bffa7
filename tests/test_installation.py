"""A Python that lacks packages, or has too old or damaged ones."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from launching import REPOSITORY, clean_environment

from mobius_train import installation
from mobius_train.installation import explain, failed_import, unmet_requirements


def caught(code: str, name: str = "mobius_train/a_module.py") -> BaseException:
    """What this code of a module of this project raises."""
    try:
        exec(compile(code, str(REPOSITORY / name), "exec"), {})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, in front on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


FAILED = {
    "missing": (None, "import a_package", "the Python package a_package is missing in"),
    "a part is missing": ("", "import a_package.inner", "the Python package a_package.inner is missing in"),
    "another version": ("", "from a_package import Name", "ImportError: cannot import name 'Name' from 'a_package'"),
    "needs a missing one": ("import b_package", "import a_package", "the Python package b_package is missing in"),
    "a library is missing": (
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "import a_package",
        "OSError: libcudart.so.12: cannot open",
    ),
    "a lazy library": (
        "def load():\n    try:\n        import b_package\n    except ImportError as error:\n"
        "        raise RuntimeError('not loaded') from error",
        "import a_package\na_package.load()",
        "the Python package b_package is missing in",
    ),
}


@pytest.mark.parametrize("case", FAILED)
def test_a_failed_import_is_told_in_one_line(case: str, packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, code, expected = FAILED[case]
    sys.modules.pop("a_package", None)
    if content is not None:
        (packages / "a_package").mkdir()
        (packages / "a_package" / "__init__.py").write_text(content)
    error = caught(code)
    explain(type(error), error, error.__traceback__)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert "pip install" in line


@pytest.mark.parametrize(
    "code",
    [
        "1 / 0",
        "import mobius_train.nothing",
        "from mobius_train.errors import Nothing",
        "import json\njson.loads('{')",
        "open('/nowhere/at/all')",
    ],
)
def test_other_errors_keep_their_traceback(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = caught(code)
    explain(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "pip install" not in shown


def test_an_absent_name_is_a_failed_import_only_if_packages_are_too_old() -> None:
    error = caught("import json\njson.nothing")
    assert failed_import(error, ["a-package>=2 (it has 1)"]) is error
    assert failed_import(error, []) is None


def test_a_folder_without_its_files_is_a_damaged_package(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.modules.pop("a_package", None)
    (packages / "a_package").mkdir()
    error = caught("import a_package\na_package.Tensor")
    explain(type(error), error, error.__traceback__)
    (line,) = capsys.readouterr().err.splitlines()
    assert "AttributeError: module 'a_package' has no attribute 'Tensor'" in line


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"error: mobius-train needs Python 3\.11 or newer"):
        runpy.run_path(installation.__file__)


def test_all_that_is_lacking_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    versions = {"torch": "2.9.1+cpu", "pydantic": "2.14.3", "numpy": "1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    required = ["torch>=2.11", "pydantic>=2", "numpy", "fsspec[http]>=3", 'emoji; extra == "emoji"']
    monkeypatch.setattr(installation, "metadata", types.SimpleNamespace(**vars(metadata)))
    monkeypatch.setattr(installation.metadata, "requires", lambda name: required)
    monkeypatch.setattr(installation.metadata, "version", version)
    assert unmet_requirements() == ["torch>=2.11 (it has 2.9.1+cpu)", "fsspec[http]>=3"]
    error = caught("import a_package_of_nobody")
    explain(type(error), error, error.__traceback__)
    assert "needs, it lacks torch>=2.11 (it has 2.9.1+cpu), fsspec[http]>=3." in capsys.readouterr().err
    # The control: with the newer version it is met.
    versions |= {"torch": "2.11.0", "fsspec": "10.0"}
    assert unmet_requirements() == []


def test_this_environment_is_complete() -> None:
    assert unmet_requirements() == []


@pytest.mark.parametrize("place", ["checkout", "its environment", "wheel"])
def test_the_remedy_fits_the_place(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "wheel":
        monkeypatch.setattr(installation, "ROOT", tmp_path)
        assert f"{sys.executable} -m pip install mobius-train" in installation.remedy()
        return
    prefix = REPOSITORY / ".venv" if place == "its environment" else tmp_path
    monkeypatch.setattr(sys, "prefix", str(prefix))
    assert (". " + str(REPOSITORY / ".venv/bin/activate") in installation.remedy()) == (place == "checkout")
    assert "-m pip install -c constraints.txt -e" in installation.remedy()


@pytest.mark.distributed
@pytest.mark.parametrize("missing", ["tqdm", "torch"])
@pytest.mark.parametrize("command", ["mobius-train", "mobius-sample", "mobius-cache"])
def test_installed_commands_tell_what_is_missing(command: str, missing: str, tmp_path: Path) -> None:
    """tqdm is needed by the first imports, torch by later ones; mobius-cache and mobius-train join a job."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = {command!r};"
        " from mobius_train.commands import main; main()"
    )
    recipe = ["--config", str(REPOSITORY / "configs" / "emoji.yaml")]
    options = {"mobius-train": recipe, "mobius-cache": recipe}.get(command, ["m", "--prompt", "a", "--output", "o"])
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the Python package {missing} is missing in {sys.executable}")
