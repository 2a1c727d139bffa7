"""The frozen branch of Stable Diffusion 3 and 3.5 computes what the untouched SD3Transformer2DModel computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from sd3 import CONFIGS, SD3Batch, sd3_batch, tiny_sd3
from torch import Tensor, nn
from torch.nn import functional as F

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelSD3, build_denoiser, weights_hash
from mobius_train.models.attention import JointProcessor, attention_layers, set_attention_backend
from mobius_train.models.backbone import fold_frames, unfold_frames, without_graph
from mobius_train.models.families import family_of
from mobius_train.models.sd3.backbone import SD3Backbone
from mobius_train.models.tokens.state import Tokens
from mobius_train.ring_shape import RingShape

kinds = pytest.mark.parametrize("kind", CONFIGS)
sizes = pytest.mark.parametrize("size", [(8, 8), (6, 14)], ids=["square", "odd"])


def walked(model: Any, batch: SD3Batch) -> list[Tokens]:
    pictures = batch.pictures()
    conditions = Conditions({TEXT: pictures["encoder_hidden_states"], POOLED: pictures["pooled_projections"]})
    backbone = SD3Backbone(model)
    return list(without_graph(backbone.features(pictures["hidden_states"], pictures["timestep"], conditions)))


def states_of(model: Any, batch: SD3Batch) -> list[tuple[Tensor | None, Tensor]]:
    """(text, image tokens) that each block gives in the untouched forward pass, and last its prediction."""
    found: list[tuple[Tensor | None, Tensor]] = []
    hooks = [block.register_forward_hook(lambda *given: found.append(given[2])) for block in model.transformer_blocks]
    with torch.no_grad():
        prediction = model(**batch.pictures(), return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return [*found, (None, prediction)]


@kinds
@sizes
def test_features_and_head_are_those_of_the_untouched_forward_bit_for_bit(kind: str, size: tuple[int, int]) -> None:
    model = tiny_sd3(kind)
    batch = sd3_batch(model, size=size)
    *blocks, (_, prediction) = states_of(copy.deepcopy(model), batch)
    _, *features = walked(model, batch)
    assert len(features) == len(blocks) == len(SD3Backbone(model).layers())
    for feature, (text, hidden) in zip(features, blocks, strict=True):
        assert torch.equal(feature.hidden, hidden)
        assert feature.grid == (size[0] // 2, size[1] // 2)
        assert text is None or torch.equal(feature.text, text)
    # The last block has no text of its own.
    assert blocks[-1][0] is None
    assert features[-1].text is features[-2].text
    assert torch.equal(SD3Backbone(model).head(features[-1]), prediction)


@kinds
def test_a_frame_does_not_depend_on_the_others(kind: str) -> None:
    model = tiny_sd3(kind)
    batch = sd3_batch(model)
    changed = torch.randn_like(batch.sample)
    changed[:, :, 1] = batch.sample[:, :, 1]
    before, after = walked(model, batch), walked(model, batch._replace(sample=changed))
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first.hidden[1::3], second.hidden[1::3])
        assert not torch.equal(first.hidden, second.hidden)


@pytest.mark.parametrize("timestep", [17, 17.0, torch.tensor(17.0), torch.tensor([17.0])])
def test_timesteps_as_denoisers_take_them(timestep: Tensor | float) -> None:
    model = tiny_sd3()
    batch = sd3_batch(model, clips=1)
    expected = unfold_frames(states_of(model, batch)[-1][1], 3)
    for stage in ("text-to-image", "text-to-video"):
        denoiser = build_denoiser(model, stage, "parallel")
        with torch.no_grad():
            assert torch.equal(denoiser.predict(batch.sample, timestep, batch.given()[2]), expected)


@kinds
def test_the_image_stage_trains_the_transformer_on_frames(kind: str) -> None:
    model = tiny_sd3(kind)
    batch = sd3_batch(model)
    denoiser = build_denoiser(model, "text-to-image", "parallel")
    assert denoiser.trained is model
    prediction = denoiser.predict(*batch.given())
    assert torch.equal(fold_frames(prediction), states_of(model, batch)[-1][1])
    prediction.square().mean().backward()
    # The text of the last block is not read.
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


@kinds
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
    backbone = SD3Backbone(model)
    assert backbone.latent_channels == 4
    assert backbone.condition_widths == {TEXT: 24, POOLED: 12}
    assert [unit for (unit,) in backbone.units()] == list(model.transformer_blocks)
    assert backbone.behind(1) == [model.transformer_blocks[-1]]
    assert family_of("SD3Transformer2DModel") is family_of("ParallelSD3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"caption_projection_dim": 16}, r"caption_projection_dim=16.*32 channels \(4 heads of 8\)"),
        ({"attention_head_dim": 5, "caption_projection_dim": 20}, "attention_head_dim=5.*even"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MobiusError, match=f"(?s){named}"):
        build_denoiser(tiny_sd3(**changes), "text-to-video", "parallel")


def test_a_transformer_of_another_kind_is_refused_by_name() -> None:
    other = PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8)
    with pytest.raises(MobiusError, match=r"PixArtTransformer2DModel.*SD3Transformer2DModel"):
        SD3Backbone(other)


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


def test_save_and_load(tmp_path: Path) -> None:
    shape = RingShape(0.5, 1, True, 1, 2)
    model = ParallelSD3.from_transformer(tiny_sd3("sd35"), shape)
    nn.init.normal_(model.ring.fusion.weight)
    model.save_pretrained(tmp_path)
    loaded = ParallelSD3.from_pretrained(tmp_path)
    assert weights_hash(loaded) == weights_hash(model)
    assert loaded.ring_shape == shape
    assert loaded.config.in_channels == 4
    batch = sd3_batch(model.spatial)
    torch.testing.assert_close(loaded.predict(*batch.given()), model.predict(*batch.given()))
    assert weights_hash(type(model.spatial).from_pretrained(tmp_path / "spatial")) == weights_hash(model.spatial)
    assert ParallelSD3.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).ring.dtype == torch.bfloat16


def test_the_ring_of_another_transformer_is_refused() -> None:
    ring = ParallelSD3.from_transformer(tiny_sd3()).ring
    with pytest.raises(MobiusError, match="does not fit"):
        ParallelSD3(tiny_sd3(num_layers=3), ring)


def test_unpatchify_is_the_inverse_of_cutting_into_patches() -> None:
    from mobius_train.models.tokens.state import unpatchify

    latents = torch.randn(2, 3, 4, 6)
    patches = F.unfold(latents, 2, stride=2).transpose(1, 2).unflatten(-1, (3, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(patches, (2, 3), 2), latents)
