"""The model card in final/: README.md with what the model is, in the layout of the Hugging Face hub."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from mobius_train.config import RunConfig
from mobius_train.yaml_files import dump_yaml

CARD, SAMPLES = "README.md", "samples"
# Files of a validation that a card can show, by their names in a run, with what they show; the first one that exists.
PICTURES = {
    "comparison.gif": "rows: the training clips, before training, after",
    "contact_sheet.png": "samples, one for each prompt",
    "reconstructions.png": "pictures, and below each its reconstruction",
}
# Bytes of the samples that a card may carry.
MOST = 8 * 2**20


def sample_command(folder: Path, prompt: str) -> str:
    """The command that draws a clip from a model, for a shell."""
    return f"python tools/sample.py {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)} --output clips/"


def write_model_card(
    folder: Path, config: RunConfig, of_task: Mapping[str, str], figures: Mapping[str, float], sample_paths: list[Path]
) -> None:
    """Write README.md, and copy the samples beside it.

    Without a licence in the recipe it is left open: it follows from those of the base model and the data.

    Args:
        folder: of the finished model.
        of_task: see `Task.overview`.
        figures: of the last validation, by name.
        sample_paths: files of the last validation; one of `PICTURES` is shown.

    Raises:
        OSError: a file cannot be written.
    """
    named = {path.name: path for path in sample_paths}
    picture = next((name for name in PICTURES if name in named and named[name].stat().st_size <= MOST), None)
    name = config.output_dir.name
    lines = ["---", yaml.safe_dump(_metadata(config), sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"- {title}: {text}" for title, text in of_task.items()]
    lines += [f"- steps: {config.steps}, with a learning rate of {config.learning_rate:g}", ""]
    if picture is not None:
        shown = f"{SAMPLES}{Path(picture).suffix}"
        shutil.copyfile(named[picture], folder / shown)
        lines += [f"![{PICTURES[picture]}]({shown})", ""]
    if config.stage == "text-to-video":
        prompt = next(iter(config.validation.prompts), "a prompt")
        lines += ["Draw a clip with mobius-train:", "", f"    {sample_command(Path('FOLDER'), prompt)}", ""]
    if figures:
        lines += ["| figure of the last validation | |", "|---|---|"]
        lines += [f"| {title} | {value:.4g} |" for title, value in sorted(figures.items())]
        lines.append("")
    licence = config.license or "Not stated. It follows from the licences of the base model and of the data."
    lines += ["## Licence", "", licence, ""]
    # The folder is a place on the machine that trained it.
    recipe = {name: value for name, value in config.public_values().items() if name != "output_dir"}
    lines += [
        "## Recipe",
        "",
        "```yaml",
        dump_yaml(recipe).strip(),
        "```",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _metadata(config: RunConfig) -> dict[str, object]:
    base = config.pretrained_model_name_or_path
    kinds = {"text-to-video": "text-to-video", "text-to-image": "text-to-image", "autoencoder": "image-to-image"}
    found: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": kinds[config.stage]}
    # The hub asks for the name of a licence that it does not know.
    found |= {"license": config.license} if config.license else {"license": "other", "license_name": "not-stated"}
    # A hub name, not a folder.
    if base is not None and base.count("/") == 1 and not Path(base).exists():
        found["base_model"] = base
    return found | {"tags": ["mobius-train", config.stage]}
