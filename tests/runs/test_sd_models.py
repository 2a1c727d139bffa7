"""Whole runs of Stable Diffusion XL and 3 and of PixArt, tiny: with all conditions, from the cache and without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from launching import launch
from recipes import DEEP, DS_CONFIGS, Run, losses, metrics, recipe, write
from tiny_sd import save_pixart, save_sd3, save_sdxl

from mobius_train.convert.to_diffusers import checkpoint_to_diffusers, to_diffusers
from mobius_train.data.cache import KEYS, LatentCache
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline
from mobius_train.pretrained.pipeline_index import named_parts

pytestmark = pytest.mark.slow
OWN_TEXT: dict[str, Any] = {"text_encoder_name_or_path": None, "max_text_tokens": None}
XL, SD3 = {"text", "pooled", "sizes"}, {"text", "pooled"}
TOKEN_RING: dict[str, Any] = DEEP | {"ring_every": 1, "context_latents": 2}


@pytest.mark.parametrize(
    ("save", "names", "changes"),
    [
        pytest.param(save_sdxl, XL, DEEP, id="sdxl-deep"),
        pytest.param(save_sd3, SD3, TOKEN_RING, id="sd3-deep"),
        pytest.param(save_sd3, SD3, {"mode": "full"}, id="sd3-full"),
        pytest.param(save_pixart, {"text", "mask", "sizes"}, {}, id="pixart"),
    ],
)
def test_a_run_trains_resumes_samples_and_exports_with_all_text_encoders(
    run: Run, tmp_path: Path, save: Any, names: set[str], changes: dict[str, Any]
) -> None:
    pipeline = save(tmp_path / "pipeline")
    options = OWN_TEXT | {"pretrained_model_name_or_path": str(pipeline), "max_train_steps": 2, **changes}
    online = run("online", checkpointing_steps=1, **options)
    options["validation"] = {"prompts": []}
    cached = run("cached", data={"cache_dir": str(tmp_path / "cache")}, **options)
    assert losses(cached) == losses(online)
    assert all(line["heldout_motion"] > 0 for line in metrics(cached) if "heldout_motion" in line)
    folder = next((tmp_path / "cache").glob("train-*"))
    keys = json.loads((folder / KEYS).read_text())
    assert set(LatentCache(folder, keys)[0].conditions.tensors) == names
    text = [part for part in named_parts(str(pipeline)) if part.startswith(("text_encoder", "tokenizer"))]
    assert set(text) <= set(named_parts(str(cached / "final")))

    final = load_pipeline(cached, "cpu")
    expected = weights_hash(final.unet)
    final.set_progress_bar_config(disable=True)
    sampling: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    clips = [final(prompt, **sampling).frames for prompt in ("a dog", "a dog", "a hen")]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])

    # It goes on from its first step to the same weights.
    shutil.rmtree(online / "final")
    shutil.rmtree(online / "checkpoint-2")
    (online / "latest").write_text("checkpoint-1\n")
    run("online", checkpointing_steps=1, resume_from_checkpoint="latest", **options)
    assert weights_hash(load_pipeline(online, "cpu").unet) == expected
    # What diffusers reads of it, and of a checkpoint, are these weights.
    for convert, source in ((to_diffusers, cached), (checkpoint_to_diffusers, online / "checkpoint-2")):
        assert not convert(source, tmp_path / convert.__name__).problems
        read = TextToVideoPipeline.from_pretrained(tmp_path / convert.__name__)
        assert weights_hash(read.unet) == expected
    # Training goes on from it.
    run("again", dry=True, **(options | {"pretrained_model_name_or_path": str(cached / "final")}))


@pytest.mark.parametrize(
    ("save", "mode"), [(save_sdxl, "serial"), (save_sdxl, "full"), (save_sd3, "parallel"), (save_sd3, "serial")]
)
def test_the_other_modes_train_with_all_text_encoders(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], save: Any, mode: str
) -> None:
    run(dry=True, pretrained_model_name_or_path=str(save(tmp_path / "pipeline")), mode=mode, **OWN_TEXT)
    assert "nothing was written" in capsys.readouterr().out


def test_a_small_transformer_learns_images_with_one_text_encoder(run: Run, tmp_path: Path) -> None:
    pipeline = save_sd3(tmp_path / "pipeline", with_t5=False)
    transformer = json.loads((pipeline / "transformer" / "config.json").read_text())
    # As wide as MiniLM's text, and its mean.
    transformer |= {"joint_attention_dim": 384, "pooled_projection_dim": 384}
    output = run(
        "images",
        stage="text-to-image",
        pretrained_model_name_or_path=None,
        unet_config={name: value for name, value in transformer.items() if name != "_diffusers_version"},
        vae_name_or_path=str(pipeline),
        scheduler_config={"_class_name": FlowMatchEulerDiscreteScheduler.__name__, "shift": 3.0},
        data={"num_frames": 1},
        max_train_steps=1,
    )
    stills = load_pipeline(output, "cpu")
    assert type(stills.unet).__name__ == "SD3Transformer2DModel"
    assert isinstance(stills.scheduler, FlowMatchEulerDiscreteScheduler)
    assert stills.text_encoder_2 is None
    frames = stills("a dog", num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 1, 3, 32, 32)
    run("clips", dry=True, pretrained_model_name_or_path=str(output / "final"))


@pytest.mark.distributed
def test_a_run_under_zero_3_on_two_ranks_goes_on_with_one(run: Run, clips_folder: Path, tmp_path: Path) -> None:
    pipeline = save_sd3(tmp_path / "pipeline")
    options = OWN_TEXT | TOKEN_RING | {"max_train_steps": 2, "validation": {"prompts": []}}
    data = {"cache_dir": str(tmp_path / "cache")}
    values = recipe(pipeline, clips_folder, tmp_path / "unused", data=data, **options)
    worker = Path(__file__).parent / "ranks_worker.py"
    arguments = (str(write(tmp_path / "recipe.yaml", values)), str(tmp_path), str(DS_CONFIGS))
    moved = "zero3+max_train_steps=1"
    result = launch(2, worker, *arguments, moved)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    options |= {"pretrained_model_name_or_path": str(pipeline), "train_batch_size": 4}
    whole = run("whole", data=data, **options)
    run(moved, data=data, resume_from_checkpoint="latest", **options)
    assert losses(tmp_path / moved) == pytest.approx(losses(whole), rel=1e-5)
    assert len(set(losses(whole))) == 2

    # Latents of another autoencoder.
    vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    vae.decoder.conv_in.weight.data += 0.01
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(MobiusError, match=r"no latent cache.*autoencoder"):
        run("other", data=data | {"cache_required": True}, vae_name_or_path=str(tmp_path / "vae"), **options)
