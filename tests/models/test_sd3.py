"""The frozen branch of a transformer computes what diffusers' untouched class computes: SD3, SD 3.5, PixArt."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import PixArtTransformer2DModel, Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from kinds import quick_first
from pixart import tiny_pixart
from sd3 import CONFIGS as SD3_CONFIGS
from sd3 import sd3_batch, tiny_sd3
from token_models import KINDS, Batch, backbone_of, batch_for, parallel_of, tiny_model, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.conditions import MASK, POOLED, SIZES, TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelPixArt, ParallelSD3, attention, build_denoiser, weights_hash
from mobius_train.models.attention import JointProcessor, attention_layers, set_attention_backend
from mobius_train.models.backbone import fold_conditions, fold_frames, unfold_frames, without_graph
from mobius_train.models.families import family_of
from mobius_train.models.pixart.backbone import PixArtBackbone
from mobius_train.models.sd3.backbone import SD3Backbone
from mobius_train.models.tokens.state import Tokens
from mobius_train.ring_shape import RingShape

kinds = pytest.mark.parametrize("kind", quick_first(KINDS, "sd3", "pixart"))
sizes = pytest.mark.parametrize("size", [(8, 8), (6, 14)], ids=["square", "odd"])


def walked(model: Any, batch: Batch) -> list[Tokens]:
    sample, timestep, conditions = batch.given()
    folded = fold_frames(sample), *fold_conditions(timestep, conditions, sample.shape[2])
    return list(without_graph(backbone_of(model).features(*folded)))


def states_of(model: Any, batch: Batch) -> list[tuple[Tensor | None, Tensor]]:
    """(text, image tokens) that each block gives in the untouched forward pass, and last its prediction."""
    found: list[Any] = []
    hooks = [block.register_forward_hook(lambda *given: found.append(given[2])) for block in model.transformer_blocks]
    prediction = untouched(model, batch)
    for hook in hooks:
        hook.remove()
    # PixArt's blocks give no text.
    return [*(each if isinstance(each, tuple) else (None, each) for each in found), (None, prediction)]


@kinds
@sizes
def test_features_and_head_are_those_of_the_untouched_forward_bit_for_bit(kind: str, size: tuple[int, int]) -> None:
    model = tiny_model(kind)
    batch = batch_for(model, size=size)
    *blocks, (_, prediction) = states_of(copy.deepcopy(model), batch)
    _, *features = walked(model, batch)
    assert len(features) == len(blocks) == len(backbone_of(model).layers())
    for feature, (text, hidden) in zip(features, blocks, strict=True):
        assert torch.equal(feature.hidden, hidden)
        assert feature.grid == (size[0] // 2, size[1] // 2)
        assert text is None or torch.equal(feature.text, text)
    # The last block has no text of its own.
    assert blocks[-1][0] is None
    assert features[-1].text is features[-2].text
    assert torch.equal(backbone_of(model).head(features[-1]), prediction)


@kinds
def test_a_frame_does_not_depend_on_the_others(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_for(model)
    changed = torch.randn_like(batch.sample)
    changed[:, :, 1] = batch.sample[:, :, 1]
    before, after = walked(model, batch), walked(model, batch._replace(sample=changed))
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first.hidden[1::3], second.hidden[1::3])
        assert not torch.equal(first.hidden, second.hidden)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
@pytest.mark.parametrize("timestep", [17, 17.0, torch.tensor(17.0), torch.tensor([17.0])])
def test_timesteps_as_denoisers_take_them(timestep: Tensor | float, kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_for(model, clips=1)
    expected = unfold_frames(states_of(model, batch)[-1][1], 3)
    for stage in ("text-to-image", "text-to-video"):
        denoiser = build_denoiser(model, stage, "parallel")
        with torch.no_grad():
            assert torch.equal(denoiser.predict(batch.sample, timestep, batch.given()[2]), expected)


@kinds
def test_the_image_stage_trains_the_transformer_on_frames(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_for(model)
    denoiser = build_denoiser(model, "text-to-image", "parallel")
    assert denoiser.trained is model
    prediction = denoiser.predict(*batch.given())
    assert torch.equal(fold_frames(prediction), states_of(model, batch)[-1][1])
    prediction.square().mean().backward()
    # The text of the last block is not read.
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    # A variance is not trained.
    head: Any = model.proj_out
    rows = head.weight.grad.unflatten(0, (4, -1))
    assert rows[:, :4].any()
    assert not rows[:, 4:].any()


@pytest.mark.parametrize("kind", SD3_CONFIGS)
def test_joint_attention_of_another_kernel_is_the_same(kind: str) -> None:
    model = tiny_sd3(kind)
    batch = sd3_batch(model)
    layers = attention_layers(model, temporal=False)
    expected = states_of(model, batch)[-1][1]
    for layer in layers:
        layer.set_processor(JointProcessor("sdpa"))
    assert torch.equal(states_of(model, batch)[-1][1], expected)
    set_attention_backend(model, "eager", temporal=False)
    assert {type(layer.processor) for layer in layers} == {JointProcessor}
    torch.testing.assert_close(states_of(model, batch)[-1][1], expected)
    set_attention_backend(model, "sdpa", temporal=False)
    assert {type(layer.processor) for layer in layers} == {JointAttnProcessor2_0}
    assert torch.equal(states_of(model, batch)[-1][1], expected)
    # The control: other weights of the text's keys give something else.
    nn.init.normal_(layers[0].add_k_proj.weight)
    assert not torch.allclose(states_of(model, batch)[-1][1], expected, atol=1e-4)


def test_its_protocol() -> None:
    model = tiny_sd3("sd35")
    assert SD3Backbone(model).condition_widths == {TEXT: 24, POOLED: 12}
    assert family_of("SD3Transformer2DModel") is family_of("ParallelSD3")
    assert PixArtBackbone(tiny_pixart()).condition_widths == {TEXT: 24, MASK: 0}
    assert PixArtBackbone(tiny_pixart("pixart-sizes")).condition_widths == {TEXT: 24, MASK: 0, SIZES: 6}
    assert family_of("Transformer2DModel") is family_of("ParallelPixArt")
    for each in (model, tiny_pixart()):
        backbone = backbone_of(each)
        assert backbone.latent_channels == 4
        assert [unit for (unit,) in backbone.units()] == list(each.transformer_blocks)
        assert backbone.behind(1) == [each.transformer_blocks[-1]]


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("sd3", {"caption_projection_dim": 16}, r"caption_projection_dim=16.*32 channels \(4 heads of 8\)"),
        ("sd3", {"attention_head_dim": 5, "caption_projection_dim": 20}, "attention_head_dim=5.*even"),
        ("sd3", {"num_layers": 0}, "num_layers=0"),
        ("pixart", {"cross_attention_dim": 24, "caption_channels": None}, r"cross_attention_dim=24.*48 channels"),
        ("pixart", {"cross_attention_dim": None}, "cross_attention_dim=None"),
        ("pixart", {"attention_head_dim": 11, "cross_attention_dim": 44}, "attention_head_dim=11.*even"),
        ("pixart", {"num_layers": 0}, "num_layers=0"),
        ("pixart", {"out_channels": 9}, "out_channels=9.*in_channels=4"),
        ("pixart", {"attention_type": "gated"}, "attention_type='gated'"),
        ("pixart-sizes", {"attention_head_dim": 8, "cross_attention_dim": 32}, "use_additional_conditions.*32"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(kind: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MobiusError, match=f"(?s){named}"):
        build_denoiser(tiny_model(kind, **changes), "text-to-video", "parallel")


def test_a_transformer_of_another_kind_is_refused_by_name() -> None:
    other = PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8)
    with pytest.raises(MobiusError, match=r"PixArtTransformer2DModel.*SD3Transformer2DModel"):
        SD3Backbone(other)
    with pytest.raises(MobiusError, match=r"SD3Transformer2DModel.*PixArtTransformer2DModel"):
        PixArtBackbone(tiny_sd3())
    for mode in ("serial", "full"):
        with pytest.raises(MobiusError, match=f"mode={mode}"):
            build_denoiser(tiny_pixart(), "text-to-video", mode)
        with pytest.raises(MobiusError, match="qk_norm"):
            build_denoiser(tiny_sd3("sd35"), "text-to-video", mode)


VIDEO, IMAGE = "text-to-video", "text-to-image"


@pytest.mark.parametrize(("size", "named"), [((8, 7), "8 x 7.*multiples of 2"), ((8, 26), "4 x 13.*12 x 12")])
@pytest.mark.parametrize(("stage", "mode"), [(VIDEO, "parallel"), (VIDEO, "serial"), (IMAGE, "parallel")])
def test_latents_that_have_no_tokens_are_refused(stage: Any, mode: Any, size: tuple[int, int], named: str) -> None:
    model = tiny_sd3()
    denoiser = build_denoiser(model, stage, mode)
    with pytest.raises(MobiusError, match=named):
        denoiser.predict(*sd3_batch(model, size=size).given())
    assert denoiser.predict(*sd3_batch(model, size=(8, 24)).given()).isfinite().all()


@pytest.mark.parametrize(("stage", "mode"), [(VIDEO, "parallel"), (VIDEO, "serial"), (IMAGE, "parallel")])
def test_a_condition_that_is_missing_is_named(stage: Any, mode: Any) -> None:
    model = tiny_sd3()
    sample, timestep, conditions = sd3_batch(model).given()
    with pytest.raises(MobiusError, match=r"pooled .*missing"):
        build_denoiser(model, stage, mode).predict(sample, timestep, Conditions.of_text(conditions[TEXT]))


@pytest.mark.parametrize("kind", ["sd35", "pixart"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    shape = RingShape(0.5, 1, True, True, 1, 2)
    model = parallel_of(tiny_model(kind), shape)
    nn.init.normal_(model.ring.fusion.weight)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert weights_hash(loaded) == weights_hash(model)
    assert loaded.ring_shape == shape
    assert loaded.config.in_channels == 4
    batch = batch_for(model.spatial)
    torch.testing.assert_close(loaded.predict(*batch.given()), model.predict(*batch.given()))
    assert weights_hash(type(model.spatial).from_pretrained(tmp_path / "spatial")) == weights_hash(model.spatial)
    assert type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).ring.dtype == torch.bfloat16


@pytest.mark.parametrize("norm_type", ["ada_norm_single", "ada_norm_zero"])
def test_the_class_that_released_weights_name(norm_type: str, tmp_path: Path) -> None:
    model = tiny_pixart("pixart-sizes")
    model.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    further = {"_class_name": Transformer2DModel.__name__, "norm_type": norm_type, "double_self_attention": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | further))
    if norm_type == "ada_norm_single":
        loaded = load_image_or_video_model(None, str(tmp_path))
        assert type(loaded) is PixArtTransformer2DModel
        assert weights_hash(loaded) == weights_hash(model)
    else:
        # DiT's class was the same.
        with pytest.raises(MobiusError, match="ada_norm_zero"):
            load_image_or_video_model(None, str(tmp_path))


def test_latents_that_have_no_tokens_are_refused_for_pixart() -> None:
    for stage in (VIDEO, IMAGE):
        image_model = tiny_pixart()
        model = build_denoiser(image_model, cast(Any, stage), "parallel")
        with pytest.raises(MobiusError, match=r"8 x 7.*multiples of 2"):
            model.predict(*batch_for(image_model, size=(8, 7)).given())


@torch.no_grad()
def test_pixart_in_the_call_signature_of_a_unet() -> None:
    model = ParallelPixArt.from_transformer(tiny_pixart("pixart-sizes"))
    batch = batch_for(model.spatial)
    arguments = batch.sample, batch.timestep, batch.text
    given: dict[str, Any] = {"added_cond_kwargs": {"time_ids": batch.sizes}, "encoder_attention_mask": batch.mask}
    prediction = model(*arguments, **given).sample
    assert torch.equal(fold_frames(prediction), untouched(model.spatial, batch))
    for name, named in (("added_cond_kwargs", "sizes .time_ids"), ("encoder_attention_mask", "mask")):
        with pytest.raises(MobiusError, match=rf"{named}.* is missing"):
            model(*arguments, **(given | {name: None}))
    with pytest.raises(MobiusError, match=r"mask.*\(2, 4\), not \(2, 5\)"):
        model(*arguments, **(given | {"encoder_attention_mask": batch.mask[:, 1:]}))
    other = given | {"encoder_attention_mask": torch.ones_like(batch.mask)}
    assert not torch.allclose(model(*arguments, **other).sample, prediction, atol=1e-4)


@torch.no_grad()
def test_flash_attention_leaves_padding_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_pixart()
    batch = batch_for(model)
    expected = untouched(model, batch)
    # In the place of flash-attn, which takes no mask.
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda q, k, v, backend: attention.sdpa(q, k, v))
    set_attention_backend(model, "flash_attn", temporal=False)
    torch.testing.assert_close(untouched(model, batch), expected)


def test_the_ring_of_another_transformer_is_refused() -> None:
    ring = ParallelSD3.from_transformer(tiny_sd3()).ring
    with pytest.raises(MobiusError, match="does not fit"):
        ParallelSD3(tiny_sd3(num_layers=3), ring)


def test_unpatchify_is_the_inverse_of_cutting_into_patches() -> None:
    from mobius_train.models.tokens.state import unpatchify

    latents = torch.randn(2, 3, 4, 6)
    patches = F.unfold(latents, 2, stride=2).transpose(1, 2).unflatten(-1, (3, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(patches, (2, 3), 2), latents)
