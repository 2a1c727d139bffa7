"""Put hostile and damaged files in place of every file that the package reads, and read them.

    python benchmarks/hostile_files.py runs/emoji --record benchmarks/hostile_files.json

RUN is the folder of a finished run whose recipe has shards and data.cache_dir. Each case takes a copy of what the run
read or wrote, replaces one file, and calls the function that a start, a resume, a tool or a conversion calls. It runs
in a process of its own, which may take 10 s and 1 GB more than before. A case is good if the file is refused by an
error with its name, or is read without effect on anything else; it is bad if it runs code, hangs, takes more memory,
ends in another error than MobiusError, or in one that does not name the file. Exits 1 on any bad case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from hostile_contents import replacements
from tqdm import tqdm

from mobius_train.assembly.weights import Pretrained
from mobius_train.checkpoint.folders import checkpoints, pointed
from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.cli import run
from mobius_train.config import load
from mobius_train.data import cache
from mobius_train.data.clips import open_clips
from mobius_train.data.patterns import local_paths
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.errors import MobiusError
from mobius_train.job.versions import versions
from mobius_train.pipeline import load_pipeline
from mobius_train.pretrained.strict_load import load_diffusers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--cases", type=int, default=400, help="drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    return parser.parse_args()


SECONDS, BYTES = 10.0, 10**9
GOOD = ("refused", "read")


@dataclass(frozen=True)
class Target:
    """A file, how it is read, and the folder of which each case takes a copy.

    Attributes:
        names: other names by which an error may call it, such as its folder's.
    """

    what: str
    folder: Path
    file: Path
    read: Callable[[Path], object]
    names: tuple[str, ...] = ()


def targets(finished: Path, data: Path) -> list[Target]:
    """What a run of this recipe reads.

    Args:
        data: an empty folder for small files.
    """
    recipe = finished / "config.yaml"
    config = load(recipe, [])
    assert config.data.cache_dir is not None
    latents = max(config.data.cache_dir.glob("train-*"), key=os.path.getmtime)
    identity, keys = (json.loads((latents / name).read_text()) for name in (cache.IDENTITY, cache.KEYS))
    shard = local_paths(config.data.train[0].path)[0]
    saved, final = checkpoints(finished)[-1], finished / "final"

    def read_cache(folder: Path) -> None:
        if damaged := cache.check_parts(folder / latents.name, keys, identity):
            raise MobiusError("\n".join(f"{cache.part_path(folder, n)}: {text}" for n, text in damaged.items()))
        cache.open_checked(folder, "train", identity, keys)

    def read_clips(source: str) -> Callable[[Path], object]:
        def read(folder: Path) -> None:
            clips = open_clips(str(folder / source), num_frames=1, resolution=8)
            _ = clips[0]

        return read

    def read_model(folder: Path) -> None:
        load_pipeline(folder, "cpu")

    def read_backbone(folder: Path) -> None:
        Pretrained().image_or_video_model(config.model_copy(update={"pretrained_model_name_or_path": str(folder)}))

    def read_vae(folder: Path) -> None:
        load_diffusers(AutoencoderKL, folder)

    shards = data / "shards"
    shards.mkdir()
    for name in (shard.name, "index.json"):
        shutil.copy(shard.with_name(name), shards / name)
    entry = open_clips([shard], num_frames=1, resolution=8).entries[0]
    clip = f"clip{entry.suffix}"
    captions = {
        "metadata.jsonl": json.dumps({"file_name": clip, "text": "a clip"}) + "\n",
        "metadata.csv": f"file_name,text\n{clip},a clip\n",
        "clip.txt": "a clip",
        "clip.json": json.dumps({"caption": "a clip"}),
    }
    for name, text in captions.items():
        folder = data / f"with-{name}"
        folder.mkdir()
        (folder / clip).write_bytes(entry.read())
        (folder / name).write_text(text)
    of_text = data / "with-clip.txt"
    settings = data / "settings"
    settings.mkdir()
    shutil.copy(recipe, settings / "recipe.yaml")
    (settings / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    run_folder = data / "run"
    run_folder.mkdir()
    shutil.copytree(saved, run_folder / saved.name, copy_function=os.link)
    shutil.copy(finished / "latest", run_folder / "latest")
    latent_root = data / "latents"
    shutil.copytree(latents, latent_root / latents.name, copy_function=os.link)
    found = [
        Target("shard", shards, shards / shard.name, read_clips(shard.name)),
        Target("index of shards", shards, shards / "index.json", read_clips(shard.name)),
        *(
            Target(f"captions: {name}", data / f"with-{name}", data / f"with-{name}" / name, read_clips("."), ("clip",))
            for name in captions
        ),
        Target("clip", of_text, of_text / clip, read_clips("."), ("clip",)),
        Target("recipe", settings, settings / "recipe.yaml", lambda folder: load(folder / "recipe.yaml", [])),
        Target("DeepSpeed JSON", settings, settings / "ds.json", lambda folder: read_ds_json(folder / "ds.json")),
        Target("latest", run_folder, run_folder / "latest", pointed),
        *(
            Target(f"checkpoint: {path.name}", run_folder, path, lambda folder: open_checkpoint(folder / saved.name))
            for path in sorted((run_folder / saved.name).iterdir())
        ),
        *(
            Target(f"latent cache: {path.name}", latent_root, path, read_cache)
            for path in sorted((latent_root / latents.name).iterdir())
            if path.suffix == ".json" or path == cache.part_path(path.parent, 0)
        ),
        *(
            Target(f"model: {path.relative_to(final)}", final, path, read_model, (path.parent.name,))
            for path in sorted(final.rglob("*"))
            if path.is_file() and path.suffix in (".json", ".safetensors", ".txt")
        ),
    ]
    backbone = final / "unet" / "spatial"
    if backbone.is_dir():
        found += [Target(f"backbone: {p.name}", backbone, p, read_backbone) for p in sorted(backbone.iterdir())]
    return found + [
        Target(f"autoencoder: {p.name}", final / "vae", p, read_vae) for p in sorted((final / "vae").iterdir())
    ]


@dataclass
class Outcome:
    """The result of one case.

    Attributes:
        result: `refused`, `read`, or what is bad about it.
        message: the first line of the error.
    """

    what: str
    replaced_by: str
    result: str
    message: str
    seconds: float
    extra_bytes: int


def _read(target: Target, folder: Path, answers: Any) -> None:
    """In the child: read, and send the result and the additional peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_DATA, (before * 1024 + 4 * BYTES,) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        target.read(folder)
        result, message = "read", ""
    except MobiusError as error:
        message = str(error)
        names = (target.file.name, *target.names)
        result = "refused" if any(name in message for name in names) else "does not name the file"
    except BaseException as error:
        result, message = "another error", f"{type(error).__name__}: {error}"
    answers.send((result, message[:300], 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def try_case(target: Target, name: str, scratch: Path) -> Outcome:
    """Read a copy of the target's folder with its file replaced."""
    marker, folder = scratch / "executed", scratch / "copy"
    shutil.copytree(target.folder, folder, copy_function=os.link)
    file = folder / target.file.relative_to(target.folder)
    content = file.read_bytes()
    file.unlink()
    replacements(content, marker)[name](file)
    context = multiprocessing.get_context("fork")
    answers, sender = context.Pipe(duplex=False)
    child = context.Process(target=_read, args=(target, folder, sender))
    started = time.monotonic()
    child.start()
    sender.close()
    result, message, extra = "hangs", "", 0
    if answers.poll(SECONDS):
        try:
            result, message, extra = answers.recv()
        except EOFError:
            result, message = "another error", "the process died"
    seconds = time.monotonic() - started
    child.kill()
    child.join()
    if extra > BYTES:
        result = "takes memory"
    if marker.exists():
        result = "runs code"
        marker.unlink()
    shutil.rmtree(folder)
    return Outcome(target.what, name, result, message.replace(str(folder), "…"), round(seconds, 3), extra)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="hostile-", dir=arguments.run.resolve().parent) as temporary:
        data, scratch = Path(temporary) / "data", Path(temporary) / "scratch"
        data.mkdir()
        scratch.mkdir()
        cases = []
        for target in targets(arguments.run.resolve(), data):
            # The control: the copy is good before its file is replaced.
            target.read(target.folder)
            cases += [(target, name) for name in replacements(b"", scratch)]
        random.Random(arguments.seed).shuffle(cases)
        for target, name in tqdm(cases[: arguments.cases or len(cases)], unit="file"):
            outcomes.append(try_case(target, name, scratch))
            if outcomes[-1].result not in GOOD:
                tqdm.write(str(outcomes[-1]))
    results = dict(Counter(outcome.result for outcome in outcomes))
    bad = [asdict(outcome) for outcome in outcomes if outcome.result not in GOOD]
    record = {
        "what": "hostile and damaged files in place of each file that the package reads",
        "results": {"files": len(outcomes)} | results,
        "most_seconds": max(outcome.seconds for outcome in outcomes),
        "most_extra_bytes": max(outcome.extra_bytes for outcome in outcomes),
        "read": dict(Counter(f"{o.what} <- {o.replaced_by}" for o in outcomes if o.result == "read")),
        "bad": bad,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions(),
    }
    arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    if bad:
        raise MobiusError(f"{len(bad)} of {len(outcomes)} cases are bad; the record lists them")


if __name__ == "__main__":
    run(main)
