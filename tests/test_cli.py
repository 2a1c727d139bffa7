import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.files import check_output_folder

ROOT = Path(__file__).resolve().parent.parent


def fail(error: Exception) -> None:
    raise error


def test_success_exits_0() -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: None)
    assert exit_info.value.code == 0


def test_a_mistake_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: fail(MobiusError("no shards in data/")))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "error: no shards in data/\n"


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: fail(ZeroDivisionError()))


def test_an_exit_status_is_kept() -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: sys.exit(3))
    assert exit_info.value.code == 3


def test_a_full_output_folder_is_refused_unless_asked_for(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    check_output_folder(tmp_path)
    kept = tmp_path / "kept.txt"
    kept.write_text("old")
    with pytest.raises(MobiusError, match=tmp_path.name):
        check_output_folder(tmp_path)
    with pytest.raises(MobiusError, match=kept.name):
        check_output_folder(kept, overwrite=True)
    check_output_folder(tmp_path, overwrite=True)
    assert kept.read_text() == "old"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("print('done')", 0, "done\n", ""),
        ("raise MobiusError('no shards')", 1, "", "error: no shards\n"),
    ],
)
def test_a_rank_leaves_with_what_it_printed_and_without_a_shutdown(body: str, code: int, out: str, err: str) -> None:
    script = (
        "import atexit\nfrom mobius_train.cli import run_rank\nfrom mobius_train.errors import MobiusError\n"
        f"atexit.register(print, 'shut down')\ndef main():\n    {body}\nrun_rank(main)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (code, out, err)


@pytest.mark.distributed
@pytest.mark.parametrize("script", ["tools/sample.py", "tools/convert_checkpoint.py", "mobius_train/main.py"])
@pytest.mark.parametrize("missing", ["mobius_train", "tqdm"])
def test_a_missing_package_is_told_with_the_environment_that_has_it(script: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    # -S: without any installed package, as the system's Python.
    options, path = ([], f"{tmp_path}:{ROOT}") if missing == "tqdm" else (["-S"], "")
    result = subprocess.run(
        [sys.executable, *options, str(ROOT / script)],
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: the Python package {missing} is missing")
    assert "Traceback" not in result.stderr
    # With -S Python does not know which environment it is in.
    inside = missing == "tqdm" and Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
    assert ("Complete this environment" if inside else ".venv/bin/activate") in result.stderr
