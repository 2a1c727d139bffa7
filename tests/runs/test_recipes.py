"""Every recipe in configs/ passes a dry run on a tiny random pipeline of the same layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import DS_CONFIGS, RECIPES
from tiny import KINDS, save_chinese_clip, save_clips, save_pipeline
from tiny_sd import save_pixart, save_sd3, save_sdxl

from mobius_train.config import load
from mobius_train.engine.spread import spread_of
from mobius_train.job import environment
from mobius_train.run import dry_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]
SMALL = ["data.resolution=32", "data.validation=null", "train_batch_size=1", "data.dataloader_num_workers=0"]
SMALL += ["data.subset=null"]


def _tiny_unet(kind: str) -> str:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in KINDS[kind].items()}
    return "unet_config=" + str(fields | {"sample_size": 8})


def _overrides(recipe: str, folder: Path) -> list[str]:
    clips = save_clips(folder / "clips", count=2, frames=8)
    common = [*SMALL, f"data.train={clips}", f"output_dir={folder / 'out'}"]
    if recipe.startswith("paper"):
        pipeline = save_pipeline(folder / "pipeline", "sd21")
        chinese = save_chinese_clip(folder / "chinese-clip")
        common += [
            f"vae_name_or_path={pipeline}",
            f"text_encoder_name_or_path={chinese}",
            f"global_batch_size={2}",
        ]
        common += [_tiny_unet("sd21")] if "t2i" in recipe else [f"pretrained_model_name_or_path={pipeline}"]
    elif recipe == "sdxl":
        common += [f"pretrained_model_name_or_path={save_sdxl(folder / 'pipeline')}"]
    elif recipe.startswith("sd3"):
        common += [f"pretrained_model_name_or_path={save_sd3(folder / 'pipeline')}", "use_t5=true"]
    elif recipe == "pixart_sigma":
        common += [f"pretrained_model_name_or_path={save_pixart(folder / 'pipeline', sigma=True)}"]
    elif recipe.startswith("sd"):
        common += [f"pretrained_model_name_or_path={save_pipeline(folder / 'pipeline', recipe)}"]
    elif recipe == "emoji_vae":
        blocks = "down_block_types: [DownEncoderBlock2D], up_block_types: [UpDecoderBlock2D]"
        common += [f"vae_config={{block_out_channels: [8], norm_num_groups: 4, {blocks}}}"]
    elif recipe == "emoji_sd3_t2i":
        common += [f"vae_name_or_path={save_pipeline(folder / 'pipeline')}"]
    elif recipe == "emoji_sd3":
        # As wide as MiniLM's text, and its mean.
        pipeline = save_sd3(folder / "pipeline", with_t5=False, text=384, pooled=384)
        common += [f"pretrained_model_name_or_path={pipeline}", f"vae_name_or_path={pipeline}", "fusion_depth=1"]
    elif recipe == "emoji_t2i":
        common += [f"vae_name_or_path={save_pipeline(folder / 'pipeline')}", _tiny_unet("emoji")]
    else:
        common += [f"pretrained_model_name_or_path={save_pipeline(folder / 'pipeline')}"]
    return common


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_dry_run_passes(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = load(path, _overrides(path.stem, tmp_path))
    dry_run(config, spread_of("deepspeed", DS_CONFIGS / "zero2.json", environment.prepare()))
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
