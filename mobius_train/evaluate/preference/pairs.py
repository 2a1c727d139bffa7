"""Pairs of clips of two folders with the same prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mobius_train.data.entry import Entry
from mobius_train.data.folder import METADATA, read_folder
from mobius_train.data.kinds import VIDEO_SUFFIXES
from mobius_train.errors import MobiusError
from mobius_train.media.clip_files import prompt_in_name

# The first that both folders have is compared. GIF is the last, since it has 256 colours and merges equal frames.
FORMATS = (*VIDEO_SUFFIXES, ".webp", ".gif")


@dataclass(frozen=True)
class Pair:
    """Two files of one format and prompt, of the first and of the second folder."""

    prompt: str
    first: Path
    second: Path


@dataclass(frozen=True)
class _Folder:
    """Names are paths without suffix. prompts: of each name, from the metadata; None without metadata."""

    path: Path
    files: dict[str, dict[str, Path]]  # suffix -> name -> file
    prompts: dict[str, str] | None

    def names(self) -> list[str]:
        if self.prompts is not None:
            return sorted(self.prompts)
        return sorted(set().union(*self.files.values()))


def pair_clips(first: Path, second: Path) -> list[Pair]:
    """Pair the clips of two folders, such as outputs of `tools/sample.py`.

    If both folders have a metadata file, clips with the same caption are a pair; the k-th clip of a repeated caption
    belongs to the k-th of the other folder. Otherwise, clips with the same name without suffix are a pair, and the
    prompt is that of the one metadata file, or the words in the name.

    Raises:
        MobiusError: a folder has no clips, the folders have different prompts or no common format, or a prompt is
            unknown.
    """
    if first.resolve() == second.resolve():
        raise MobiusError(f"{first} would be compared with itself: give the folders of two models")
    ours, theirs = _read(first), _read(second)
    if ours.prompts is not None and theirs.prompts is not None:
        names = _match(first, _numbered(ours.prompts), second, _numbered(theirs.prompts))
        prompts = [ours.prompts[name] for name, _ in names]
    else:
        same = [{(name, 1): name for name in folder.names()} for folder in (ours, theirs)]
        names = _match(first, same[0], second, same[1])
        prompts = _prompts_of([name for name, _ in names], ours.prompts or theirs.prompts)
    for suffix in FORMATS:
        of_first, of_second = ours.files.get(suffix, {}), theirs.files.get(suffix, {})
        if all(name in of_first and other in of_second for name, other in names):
            return [Pair(p, of_first[name], of_second[other]) for p, (name, other) in zip(prompts, names, strict=True)]
    have = " and ".join(f"{folder.path} has {', '.join(folder.files)}" for folder in (ours, theirs))
    raise MobiusError(
        f"no format has all clips of both folders: {have}. Different formats would give the models away: sample both"
        " with the same --formats"
    )


def _read(path: Path) -> _Folder:
    if not path.is_dir():
        raise MobiusError(f"there is no folder {path}: give a folder of clips, such as an output of tools/sample.py")
    prompts = None
    if any((path / name).exists() for name in METADATA):
        prompts = {entry.key: _only_caption(entry) for entry in read_folder(path, "en")}
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).with_suffix("").as_posix()
        if file.suffix.lower() in FORMATS and not file.name.startswith(".") and (prompts is None or name in prompts):
            files.setdefault(file.suffix.lower(), {})[name] = file
    if not files:
        raise MobiusError(f"{path} has no clips ({' '.join(FORMATS)}): give an output of tools/sample.py")
    return _Folder(path, files, prompts)


def _only_caption(entry: Entry) -> str:
    if len(entry.captions) > 1:
        raise MobiusError(
            f"{entry.name} has {len(entry.captions)} captions: leave the prompt alone in the metadata file"
        )
    return entry.captions[0].text


def _numbered(prompts: dict[str, str]) -> dict[tuple[str, int], str]:
    """The name of the k-th clip of each prompt, from 1."""
    counts: Counter[str] = Counter()
    names = {}
    for name, prompt in sorted(prompts.items()):
        counts[prompt] += 1
        names[prompt, counts[prompt]] = name
    return names


def _match(
    first: Path, ours: dict[tuple[str, int], str], second: Path, theirs: dict[tuple[str, int], str]
) -> list[tuple[str, str]]:
    """The names in both folders of each clip."""
    only = [
        f"only {folder} has {_some(text for text, _ in missing)}"
        for folder, missing in ((first, ours.keys() - theirs), (second, theirs.keys() - ours))
        if missing
    ]
    if only:
        raise MobiusError(f"the prompts differ: {'; '.join(only)}. Sample both models with the same prompts")
    return [(name, theirs[clip]) for clip, name in ours.items()]


def _prompts_of(names: list[str], listed: dict[str, str] | None) -> list[str]:
    prompts = [listed[name] if listed else prompt_in_name(Path(name).name) for name in names]
    unknown = [name for name, prompt in zip(names, prompts, strict=True) if prompt is None]
    if unknown:
        raise MobiusError(
            f"these file names may not have the whole prompt: {_some(unknown)}. List the files and their prompts in a"
            f" {METADATA[0]} beside the clips"
        )
    return [prompt for prompt in prompts if prompt is not None]


def _some(texts: Iterable[str], most: int = 5) -> str:
    shown = sorted(set(texts))
    return ", ".join(shown) if len(shown) <= most else f"{', '.join(shown[:most])} and {len(shown) - most} more"
