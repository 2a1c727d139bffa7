"""The model card in final/: README.md with what the model is, in the layout of the Hugging Face hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from mobius_train.config import RunConfig

CARD, SAMPLES = "README.md", "samples.gif"
# Bytes of the samples that a card may carry.
MOST = 8 * 2**20


def write_model_card(
    folder: Path, config: RunConfig, of_task: Mapping[str, str], figures: Mapping[str, float], sample_paths: list[Path]
) -> None:
    """Write README.md, and copy the samples beside it.

    The licence is left open: it follows from those of the base model and the data.

    Args:
        folder: of the finished model.
        of_task: see `Task.overview`.
        figures: of the last validation, by name.
        sample_paths: files of the last validation; the comparison is shown if there is one.

    Raises:
        OSError: a file cannot be written.
    """
    shown = next((path for path in sample_paths if path.name == "comparison.gif"), None)
    if shown is not None and shown.stat().st_size <= MOST:
        shutil.copyfile(shown, folder / SAMPLES)
    else:
        shown = None
    name = config.output_dir.name
    lines = ["---", yaml.safe_dump(_metadata(config), sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"- {title}: {text}" for title, text in of_task.items()]
    lines += [f"- steps: {config.max_train_steps}, with a learning rate of {config.learning_rate:g}", ""]
    if shown is not None:
        lines += [f"![rows: the training clips, before training, after]({SAMPLES})", ""]
    if config.stage == "text-to-video":
        prompt = next(iter(config.validation.prompts), "a prompt")
        command = f'python tools/sample.py FOLDER --prompt "{prompt}" --output clips/'
        lines += ["Draw a clip with mobius-train:", "", f"    {command}", ""]
    if figures:
        lines += ["| figure of the samples | |", "|---|---|"]
        lines += [f"| {title} | {value:.4g} |" for title, value in sorted(figures.items())]
        lines.append("")
    lines += ["## Licence", "", "Not stated. It follows from the licences of the base model and of the data.", ""]
    # The folder is a place on the machine that trained it.
    recipe = {name: value for name, value in config.model_dump(mode="json").items() if name != "output_dir"}
    lines += [
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _metadata(config: RunConfig) -> dict[str, object]:
    base = config.pretrained_model_name_or_path
    kinds = {"text-to-video": "text-to-video", "text-to-image": "text-to-image", "autoencoder": "image-to-image"}
    found: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": kinds[config.stage], "license": "other"}
    # A hub name, not a folder.
    if base is not None and base.count("/") == 1 and not Path(base).exists():
        found["base_model"] = base
    return found | {"tags": ["mobius-train", config.stage]}
