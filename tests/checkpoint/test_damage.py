"""Damaged and hostile checkpoints: `latest` passes over them, a name is refused, and each error names the file."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDENTITY, Numbers, make, seal
from safetensors.torch import save_file

from mobius_train.checkpoint import random_states
from mobius_train.checkpoint.accepted import Accepted
from mobius_train.checkpoint.format import files_of
from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.checkpoint.resume import find, resume
from mobius_train.checkpoint.saver import Identity, Retention, Saver
from mobius_train.checkpoint.verify import problems
from mobius_train.engine.contents import check
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

FILES = sorted(files_of(2) | {"manifest.json"})
RANDOM = "random-00000-of-00001.json"
SHARD, OTHER_SHARD = "rank-00001-of-00002.safetensors", "rank-00000-of-00002.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    """One bit of a digit or a tensor, so that JSON stays JSON."""
    content = bytearray(path.read_bytes())
    place = len(content) - 1 if path.suffix == ".safetensors" else next(i for i, b in enumerate(content) if b in b"024")
    content[place] ^= 1
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    """The same file of the step before."""
    shutil.copy(path.parent.parent / "checkpoint-2" / path.name, path)


EACH = [(damage, name) for damage in (truncate, empty, remove, flip, swap) for name in FILES]
# The recipe and random states of this process do not change from step to step.
EACH = [pair for pair in EACH if pair[0] is not swap or pair[1].startswith(("rank", "state", "manifest"))]


@pytest.mark.parametrize(("damage", "name"), EACH, ids=lambda value: getattr(value, "__name__", value))
def test_any_damage_to_any_file_is_told_and_the_checkpoint_before_is_taken(
    damage: Callable[[Path], None], name: str, tmp_path: Path, alone: Distributed, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = make(tmp_path, 2), make(tmp_path, 4)
    assert find(tmp_path, "latest", alone) == bad
    damage(bad / name)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "latest", alone) == good
    assert name in caplog.text
    with pytest.raises(MobiusError, match=name):
        find(tmp_path, "checkpoint-4", alone)
    with pytest.raises(MobiusError, match=name):
        open_checkpoint(bad)
    engine = Numbers()
    resume(good, engine, IDENTITY, alone)
    assert all(torch.equal(engine.state[name], tensor) for name, tensor in Numbers(2).state.items())


class Command:
    """A pickle that would run a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_any_file_runs_no_command(name: str, tmp_path: Path, alone: Distributed) -> None:
    bad, proof = make(tmp_path, 4), tmp_path / "proof"
    hostile = pickle.dumps(Command(proof))
    (bad / name).write_bytes(hostile)
    if name != "manifest.json":
        # The manifest agrees with it.
        seal(bad)
    if name in ("config.yaml", "random-00000-of-00002.json", "random-00001-of-00002.json"):
        checkpoint = open_checkpoint(bad)
        with pytest.raises(MobiusError, match=name):
            _ = checkpoint.config if name == "config.yaml" else checkpoint.random_states(int(name[11]))
    else:
        with pytest.raises(MobiusError, match=name):
            find(tmp_path, "latest", alone)
    assert not proof.exists()
    # The control: unpickled, it does.
    pickle.loads(hostile)
    assert proof.exists()


def test_yaml_that_would_run_a_command_does_not(tmp_path: Path) -> None:
    folder, proof = make(tmp_path, 4), tmp_path / "proof"
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {proof}']\n")
    seal(folder)
    with pytest.raises(MobiusError, match=r"config\.yaml"):
        _ = open_checkpoint(folder).config
    assert not proof.exists()


def test_a_checkpoint_of_another_number_of_ranks_than_it_says(tmp_path: Path) -> None:
    folder = make(tmp_path, 4, ranks=2, world_size=4)
    assert "manifest.json" in problems(folder)[0]
    assert "4 rank(s)" in problems(folder)[0]


def test_a_renamed_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 4).rename(tmp_path / "checkpoint-6")
    assert problems(folder) == [f"{folder}/manifest.json: it belongs to step 4"]


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return problems(folder)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].pop(SHARD), "manifest.json"),
        (lambda m: m["files"].clear(), "manifest.json"),
        (lambda m: m["files"].update({"../../escape": m["files"][SHARD]}), "escape"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][SHARD]}), "passwd"),
        (lambda m: m["files"][SHARD].update(bytes=1), SHARD),
        (lambda m: m["files"][SHARD].update(sha256="0" * 64), SHARD),
        (lambda m: m["files"][SHARD].update(more=1), "manifest.json"),
        (lambda m: m.update(files=[]), "manifest.json"),
        (lambda m: m.update(step="4"), "manifest.json"),
        (lambda m: m.update(format=2), "manifest.json"),
        (lambda m: m.update(more=2), "manifest.json"),
    ],
)
def test_an_edited_manifest(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    assert message in _edit(make(tmp_path, 4), change)


NESTED: Any = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"world_size": 10**9}, "manifest.json"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": "2"}, "world_size"),
        ({"world_size": True}, "world_size"),
        ({"global_batch_size": -8}, "global_batch_size"),
        ({"progress": []}, "progress"),
        ({"progress": {}}, "progress"),
        ({"progress": {"step": 4, "samples_seen": -1}}, "samples_seen"),
        ({"progress": {"step": 4, "samples_seen": 1.5}}, "samples_seen"),
        ({"progress": {"step": True}}, "step"),
        ({"progress": {"step": NESTED}}, "state.json"),
        ({"contents": None}, "contents"),
        ({"contents": {"engine": "numbers"}}, "contents"),
        ({"scalars": {"adam_step": "4"}}, "adam_step"),
        ({"scalars": [4]}, "scalars"),
        ({"frozen_sha256": None}, "frozen_sha256"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"data": {"seed": 2}}, "data"),
        ({"more": 1}, "more"),
    ],
)
def test_a_state_of_wrong_types_or_values(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    found = problems(make(tmp_path, 4, **change))
    assert len(found) == 1
    assert where in found[0]
    assert "state.json" in found[0]


@pytest.mark.parametrize("trained", [[], {"ring.a": 5}, {"ring.a": [5, -3]}, {"ring.a": [5.0, 3]}, {"ring.a": NESTED}])
def test_trained_parameters_of_wrong_types(trained: Any, tmp_path: Path) -> None:
    contents = {"engine": "numbers", "zero_stage": 1, "mixed_precision": "no", "use_ema": True, "trained": trained}
    assert "state.json" in problems(make(tmp_path, 4, contents=contents))[0]


@pytest.mark.parametrize(
    "pieces",
    [
        "[" * 100_000,
        "3",
        "[]",
        '{"weights/ring.a": 3}',
        '{"weights/ring.a": ["13", [5, 3]]}',
        '{"weights/ring.a": [13, [5.0, 3]]}',
        '{"weights/ring.a": [13, [-5, -3]]}',
        '{"weights/ring.a": [true, [5, 3]]}',
        '{"weights/ring.a": [13, "15"]}',
        '{"weights/ring.a": [13, [[5, 3]]]}',
    ],
)
def test_pieces_of_wrong_types(pieces: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    save_file({"weights/ring.a": torch.zeros(2)}, folder / SHARD, {"pieces": pieces})
    seal(folder)
    assert SHARD in problems(folder)[0]


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "config.yaml", RANDOM])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "", "\udcff", "-", "[1]"])
def test_texts_of_no_use(name: str, text: str, tmp_path: Path, alone: Distributed) -> None:
    folder = make(tmp_path, 4, ranks=1)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if name != "manifest.json":
        seal(folder)
    with pytest.raises(MobiusError, match=name):
        resume(_found(tmp_path, alone), Numbers(), IDENTITY, alone)


def _found(output_dir: Path, alone: Distributed) -> Path:
    folder = find(output_dir, "latest", alone)
    assert folder is not None
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.clear(),
        lambda s: s.update(torch=""),
        lambda s: s.update(torch="!"),
        lambda s: s.update(torch=None),
        lambda s: s.update(python=[]),
        lambda s: s.update(python=[3, [], None]),
        lambda s: s.update(python=[3, [-1] * 625, None]),
        lambda s: s.update(numpy=[]),
        lambda s: s.update(numpy=["MT19937", [], 0, 0, 0.0]),
        lambda s: s.update(numpy=["MT19937", [-1] * 624, 0, 0, 0.0]),
        lambda s: s.update(numpy=NESTED),
    ],
)
def test_random_states_that_are_none(change: Callable[[Any], object], tmp_path: Path, alone: Distributed) -> None:
    folder, before = make(tmp_path, 4, ranks=1), random_states.take()
    states = json.loads((folder / RANDOM).read_text())
    change(states)
    (folder / RANDOM).write_text(json.dumps(states))
    seal(folder)
    with pytest.raises(MobiusError, match=RANDOM):
        resume(_found(tmp_path, alone), Numbers(), IDENTITY, alone)
    random_states.put(before)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", [_pipe, _device, Path.mkdir], ids=["pipe", "device", "folder"])
@pytest.mark.parametrize("name", [*FILES, "latest"])
def test_what_is_no_file_is_told_at_once(
    kind: Callable[[Path], object],
    name: str,
    tmp_path: Path,
    alone: Distributed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = make(tmp_path, 2), make(tmp_path, 4)
    path = (tmp_path if name == "latest" else bad) / name
    size = path.stat().st_size
    path.unlink()
    kind(path)
    if name not in ("latest", "manifest.json"):
        # A pipe has no bytes: the manifest agrees with it.
        manifest = json.loads((bad / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = path.stat().st_size
        (bad / "manifest.json").write_text(json.dumps(manifest))
    assert size > 0
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "latest", alone) == (bad if name == "latest" else good)
    assert name in caplog.text


def test_links_under_temporary_names_are_not_followed(tmp_path: Path, alone: Distributed) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    run = tmp_path / "run"
    make(run, 4)
    for name in (".checkpoint-4.tmp", ".checkpoint-5.tmp", ".checkpoint-4.old.tmp"):
        (run / name).symlink_to(tmp_path / "elsewhere")
    with Saver(run, Numbers(), IDENTITY, Retention(total_limit=1), alone) as saver:
        saver.save({"step": 4})
        saver.wait()
        # Planted while the run is on its way.
        (run / ".checkpoint-5.tmp").symlink_to(tmp_path / "elsewhere")
        saver.save({"step": 5})
        saver.wait()
        (run / ".checkpoint-6.tmp").mkdir()
        (run / ".checkpoint-6.tmp" / "state.json").symlink_to(tmp_path / "elsewhere" / "kept")
        os.link(tmp_path / "elsewhere" / "kept", run / ".checkpoint-6.tmp" / "config.yaml")
        os.mkfifo(run / ".checkpoint-6.tmp" / RANDOM)
        saver.save({"step": 6})
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["kept"]
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"
    assert problems(run / "checkpoint-6") == []


def test_a_file_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    assert SHARD in problems(folder)[0]


@pytest.mark.parametrize(
    "tensors",
    [
        {"weights/ring.a": torch.zeros(3)},
        {"weights/ring.a": torch.zeros(5, 3)},
        {"weights/ring.a": torch.zeros(3, dtype=torch.float64)},
    ],
)
def test_tensors_that_are_no_ranges(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    pieces = json.dumps({"weights/ring.a": [13, [5, 3]]})
    save_file(tensors, folder / SHARD, {"pieces": pieces})
    seal(folder)
    assert SHARD in problems(folder)[0]


def test_ranges_that_make_no_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    shutil.copy(folder / OTHER_SHARD, folder / SHARD)
    seal(folder)
    assert "ring.a" in problems(folder)[0]


@pytest.mark.parametrize(
    "target",
    ["checkpoint-9", "../checkpoint-4", "/etc", "checkpoint-4/../checkpoint-4", "checkpoint-04", "", "\0", "x" * 9999],
)
def test_a_pointer_to_nowhere_or_outside_is_not_followed(
    target: str, tmp_path: Path, alone: Distributed, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 2)
    newest = make(tmp_path / "run", 4)
    make(tmp_path / "run", 2)
    (tmp_path / "run" / "latest").write_text(target)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path / "run", "latest", alone) == newest
    assert "latest names" in caplog.text


def test_a_missing_pointer(tmp_path: Path, alone: Distributed, caplog: pytest.LogCaptureFixture) -> None:
    newest = make(tmp_path, 4)
    (tmp_path / "latest").unlink()
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "latest", alone) == newest
    assert "latest is missing" in caplog.text


def test_when_all_are_damaged_all_are_named(tmp_path: Path, alone: Distributed) -> None:
    truncate(make(tmp_path, 2) / SHARD)
    empty(make(tmp_path, 4) / "state.json")
    with pytest.raises(MobiusError, match=r"(?s)checkpoint-4/state\.json.*checkpoint-2/" + SHARD):
        find(tmp_path, "latest", alone)


def test_an_unfinished_checkpoint_is_none(tmp_path: Path, alone: Distributed) -> None:
    make(tmp_path, 4).rename(tmp_path / ".checkpoint-4.tmp")
    with pytest.raises(MobiusError, match="resume_from_checkpoint=latest"):
        find(tmp_path, "latest", alone)


@pytest.mark.parametrize(
    ("engine", "identity", "message"),
    [
        (Numbers(), replace(IDENTITY, frozen_sha256="1" * 64, frozen_source="other/backbone"), "other/backbone"),
        (Numbers(precision="bf16"), IDENTITY, "mixed_precision='no'"),
        (Numbers(shapes={"ring.a": [5, 3], "ring.c": [7]}), IDENTITY, r"ring\.b"),
        (Numbers(shapes={"ring.a": [3, 5], "ring.b": [7]}), IDENTITY, r"ring\.a"),
        (Numbers(), replace(IDENTITY, global_batch_size=6), "gradient_accumulation_steps.*8"),
    ],
)
def test_a_good_checkpoint_of_another_run_is_refused_and_nothing_is_loaded(
    engine: Numbers, identity: Identity, message: str, tmp_path: Path, alone: Distributed
) -> None:
    folder = make(tmp_path, 4)
    before = {name: tensor.clone() for name, tensor in engine.state.items()}
    with pytest.raises(MobiusError, match=message):
        resume(folder, engine, identity, alone)
    assert all(torch.equal(engine.state[name], tensor) for name, tensor in before.items())


def test_other_data_are_named_and_refused_unless_the_user_accepts_them(
    tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, 4)
    resume(folder, Numbers(), IDENTITY, alone)
    assert "data" not in capsys.readouterr().out  # the control
    other = replace(IDENTITY, data={"clips and captions": "b" * 64, "seed": "2", "random_frame": "True"})
    with pytest.raises(
        MobiusError, match=r"(?s)clips and captions: a+…, now b+….*random_frame: none, now True"
    ) as error:
        resume(folder, Numbers(), other, alone)
    assert "seed" not in str(error.value)
    assert "resume_with_changed_data" in str(error.value)
    engine = Numbers()
    resume(folder, engine, other, alone, Accepted(data=True))
    assert engine.step == 4
    assert "random_frame: none, now True" in capsys.readouterr().out


def test_a_checkpoint_without_data_of_an_older_version_says_what_is_not_checked(
    tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, 4)
    values = json.loads((folder / "state.json").read_text())
    del values["data"]
    (folder / "state.json").write_text(json.dumps(values))
    seal(folder)
    assert resume(folder, Numbers(), IDENTITY, alone)["step"] == 4
    assert "cannot be checked" in capsys.readouterr().out


def test_a_resume_prints_each_field_that_is_other(
    tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, 4, ranks=1)
    resume(folder, Numbers(), IDENTITY, alone)
    assert "other than before" not in capsys.readouterr().out
    now = replace(IDENTITY, config="seed: 2\nuse_ema: false\ndata: {train: b}\n", versions={"torch": "3"})
    (folder / "config.yaml").write_text("seed: 2\nuse_ema: true\noutput_dir: a\ndata: {train: a}\n")
    seal(folder)
    resume(folder, Numbers(use_ema=False), now, alone)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other than before: ")]
    assert [line.removeprefix("other than before: ") for line in told] == [
        "use_ema was True, now False",
        "data.train was a, now b",
        "version of torch was 2, now 3",
    ]


def test_an_average_that_was_not_saved(tmp_path: Path, alone: Distributed) -> None:
    without = Numbers(use_ema=False).contents()
    folder = make(tmp_path, 4, ranks=1)
    resume(folder, Numbers(use_ema=False), IDENTITY, alone)
    with pytest.raises(MobiusError, match="use_ema"):
        check("saved", without, Numbers().contents())
