"""Vchitect's block: its equations, the start as SD3, and what is trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models import attention as attention_module
from mobius_train.models.attention import AttentionBackend, attention_layers, set_attention_backend
from mobius_train.models.backbone import fold_conditions, fold_frames, unfold_frames
from mobius_train.models.freezing import FULL, apply_freezing, new_parts
from mobius_train.models.hashing import weights_hash
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.sd3.serial import SerialSD3
from mobius_train.models.sd3.vchitect import VchitectLayers

HEADS, SIZE, DEPTH = 2, 6, 3


def transformer(**changes: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "num_layers": DEPTH,
        "attention_head_dim": SIZE,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 10,
        "caption_projection_dim": HEADS * SIZE,
        "pooled_projection_dim": 7,
        "in_channels": 4,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(config | changes)).eval()


def trained(spatial_scale: float = 1.0) -> SerialSD3:
    """A model whose output projections are not zero any more, and whose rotation matters."""
    model = SerialSD3.from_sd3(transformer(), spatial_scale).eval()
    torch.manual_seed(1)
    for parameter in model.temporal.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def given(clips: int = 2, frames: int = 3) -> tuple[Tensor, Tensor, Conditions]:
    """Clips of 3 x 5 tokens a frame, as `Denoiser.predict` takes them."""
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(clips, 4, frames, 6, 10, generator=generator)
    conditions = {
        TEXT: torch.randn(clips, 4, 10, generator=generator),
        POOLED: torch.randn(clips, 7, generator=generator),
    }
    return sample, torch.tensor([17.0, 801.0, 400.0])[:clips], Conditions(conditions)


def stills(model: SD3Transformer2DModel, sample: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """What the image model predicts on all frames, folded into one batch."""
    frames = sample.shape[2]
    folded, conditions = fold_conditions(timestep, conditions, frames)
    predicted = model(
        hidden_states=fold_frames(sample),
        timestep=folded,
        encoder_hidden_states=conditions[TEXT],
        pooled_projections=conditions[POOLED],
        return_dict=False,
    )[0]
    return unfold_frames(predicted, frames)


# The equations, token by token.


def one_head(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in keys]
    return sum((score / sum(scores)) * value for score, value in zip(scores, values, strict=True))  # type: ignore[return-value]


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (D,) of all heads."""
    heads = [slice(h * SIZE, (h + 1) * SIZE) for h in range(HEADS)]
    return torch.cat([one_head(query[h], [k[h] for k in keys], [v[h] for v in values]) for h in heads])


def rotated(vector: Tensor, frame: int) -> Tensor:
    """Pairs of neighbouring channels of each head, turned by frame · 1e6^(-2j/size)."""
    result = vector.clone()
    for first in range(0, HEADS * SIZE, 2):
        angle = frame * 1e6 ** (-(first % SIZE) / SIZE)
        a, b = float(vector[first]), float(vector[first + 1])
        result[first] = a * math.cos(angle) - b * math.sin(angle)
        result[first + 1] = a * math.sin(angle) + b * math.cos(angle)
    return result


def reference(
    attn: Any, branch: Any, x: Tensor, c: Tensor, frames: int, scale: float, released: bool
) -> tuple[Tensor, Tensor]:
    """The block's attention by loops over clips, frames and tokens; x (B·F, S, D), c (B·F, L, D).

    Args:
        released: take keys and values of the cross branch as the released code does: the tokens of the first clip's
            first frame, split over the clips.
    """
    clips, places, image = len(x) // frames, x.shape[1] + c.shape[1], x.shape[1]

    def tokens(of_image: nn.Module, of_text: nn.Module) -> list[list[Tensor]]:
        """The projected tokens [x ; c] of each frame."""
        return [[*map(of_image, x[n]), *map(of_text, c[n])] for n in range(clips * frames)]

    q, k, v = (
        tokens(*pair)
        for pair in ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
    )
    q_t, k_t, v_t = (
        tokens(*pair)
        for pair in (
            (branch.to_q_temp, attn.add_q_proj),
            (branch.to_k_temp, attn.add_k_proj),
            (branch.to_v_temp, attn.add_v_proj),
        )
    )
    q_x = tokens(branch.to_q_cross, attn.add_q_proj)
    out_x, out_c = torch.zeros_like(x), torch.zeros_like(c)
    for b in range(clips):
        anchor = b * frames
        keys, values = [attn.add_k_proj(t) for t in c[anchor]], [attn.add_v_proj(t) for t in c[anchor]]
        if released:
            share = c.shape[1] // clips
            mine = slice(b * share, (b + 1) * share)
            keys, values = [attn.add_k_proj(t) for t in c[0][mine]], [attn.add_v_proj(t) for t in c[0][mine]]
        for f in range(frames):
            n = b * frames + f
            for p in range(places):
                inner = scale * attention(q[n][p], k[n], v[n])
                inner = inner + branch.to_out_context(attention(q_x[n][p], keys, values))
                of_frames = range(b * frames, (b + 1) * frames)
                over_time = attention(
                    rotated(q_t[n][p], f),
                    [rotated(k_t[m][p], m - b * frames) for m in of_frames],
                    [v_t[m][p] for m in of_frames],
                )
                moves = frames > 1
                if p < image:
                    out_x[n, p] = attn.to_out[0](inner) + (branch.to_out_temporal(over_time) if moves else 0)
                else:
                    text = inner if attn.context_pre_only else attn.to_add_out(inner)
                    if moves and branch.to_add_out_temporal is not None:
                        text = text + branch.to_add_out_temporal(over_time)
                    out_c[n, p - image] = text
    return out_x, out_c


@torch.no_grad()
def compared(model: SerialSD3, block: int, clips: int, frames: int, released: bool = False) -> float:
    """The largest difference of a block's attention from the reference, relative to its largest value."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(clips * frames, 5, HEADS * SIZE, generator=generator)
    c = torch.randn(clips * frames, 4, HEADS * SIZE, generator=generator)
    attn: Any = model.transformer.transformer_blocks[block].attn
    branch = model.temporal.blocks[block]
    mine = attn(hidden_states=x, encoder_hidden_states=c, branches={attn: branch}, num_frames=frames)
    scale = float(model.temporal.config.spatial_scale)
    theirs = reference(attn, branch, x, c, frames, scale, released)
    differences = [(one - other).abs().max() / other.abs().max() for one, other in zip(mine, theirs, strict=True)]
    return float(max(differences))


@pytest.mark.parametrize("block", [0, DEPTH - 1], ids=["first", "last"])
@pytest.mark.parametrize(("clips", "frames", "scale"), [(2, 3, 1.1), (1, 4, 1.0), (2, 1, 1.1)])
def test_a_block_computes_the_equations(block: int, clips: int, frames: int, scale: float) -> None:
    assert compared(trained(scale), block, clips, frames) < 1e-5


def test_the_released_formula_is_the_same_for_one_clip_and_another_for_two() -> None:
    assert compared(trained(1.1), 0, clips=1, frames=3, released=True) < 1e-5
    assert compared(trained(1.1), 0, clips=2, frames=3, released=True) > 1e-2


@torch.no_grad()
def test_clips_do_not_see_each_other_and_frames_do() -> None:
    model, (sample, timestep, conditions) = trained(), given()
    both = model.predict(sample, timestep, conditions)
    for clip in range(2):
        alone = Conditions({name: each[clip : clip + 1] for name, each in conditions.tensors.items()})
        one = model.predict(sample[clip : clip + 1], timestep[clip : clip + 1], alone)
        torch.testing.assert_close(one[0], both[clip], rtol=1e-4, atol=1e-5)
    turned = model.predict(sample.flip(2), timestep, conditions).flip(2)
    # RoPE tells the order of frames apart.
    assert (turned - both).abs().max() > 1e-2


@torch.no_grad()
def test_a_new_model_predicts_what_sd3_does_bit_for_bit() -> None:
    image_model = transformer()
    for frames in (1, 3):
        sample, timestep, conditions = given(frames=frames)
        expected = stills(image_model, sample, timestep, conditions)
        model = SerialSD3.from_sd3(copy.deepcopy(image_model)).eval()
        assert torch.equal(model.predict(sample, timestep, conditions), expected)
        # A number, as sampling gives it, is one timestep for all clips.
        same = stills(image_model, sample, torch.tensor([17.0, 17.0]), conditions)
        assert torch.equal(model.predict(sample, 17, conditions), same)
        scaled = SerialSD3.from_sd3(copy.deepcopy(image_model), spatial_scale=1.1).eval()
        assert not torch.allclose(scaled.predict(sample, timestep, conditions), expected, atol=1e-3)


@torch.no_grad()
def test_the_transformer_inside_stays_the_image_model_and_can_be_shared() -> None:
    image_model, given_ = transformer(), given()
    before, names = stills(image_model, *given_), list(image_model.state_dict())
    one, other = trained(), SerialSD3.from_sd3(image_model).eval()
    third = SerialSD3(image_model, copy.deepcopy(one.temporal))
    assert list(image_model.state_dict()) == names
    assert type(image_model) is SD3Transformer2DModel
    assert torch.equal(stills(image_model, *given_), before)
    # The second model of the same transformer does not change the first.
    assert torch.equal(other.predict(*given_), before)
    assert torch.equal(third.predict(*given_), one.predict(*given_))
    assert not torch.allclose(third.predict(*given_), before, atol=1e-2)


@torch.no_grad()
def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model, given_ = trained(1.1), given()
    model.save_pretrained(tmp_path)
    loaded = SerialSD3.from_pretrained(tmp_path).eval()
    assert loaded.temporal.config.spatial_scale == 1.1
    assert weights_hash(loaded) == weights_hash(model)
    assert torch.equal(loaded.predict(*given_), model.predict(*given_))
    alone = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    assert torch.equal(stills(alone, *given_), stills(transformer(), *given_))
    assert torch.equal(copy.deepcopy(model).predict(*given_), model.predict(*given_))


@pytest.mark.parametrize("mode", ["serial", "full"])
def test_gradients_reach_what_is_trained_and_recomputation_does_not_change_them(mode: str) -> None:
    gradients: list[dict[str, Any]] = []
    for recompute in (False, True):
        model = trained()
        apply_freezing(model, FULL if mode == "full" else new_parts(model))
        model.train().set_memory(LayerMemory(gradient_checkpointing=recompute))
        model.predict(*given()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    kept, recomputed = gradients
    for name, gradient in kept.items():
        if name.startswith("transformer.") and mode == "serial":
            assert gradient is None, name
            assert recomputed[name] is None
        # The text output of SD3's last block is not used, so neither are the queries of its text.
        elif not name.startswith(f"transformer.transformer_blocks.{DEPTH - 1}.attn.add_q_proj"):
            assert gradient is not None, name
            # Equal keys that are all shifted by one vector change no softmax, but for the rotation.
            assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
            assert torch.equal(gradient, recomputed[name]), name


def test_a_new_model_learns_in_every_branch_after_one_step() -> None:
    model = SerialSD3.from_sd3(transformer())
    apply_freezing(model, new_parts(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.predict(*given()).square().mean().backward()
        optimizer.step()
    without = [n for n, p in model.temporal.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_single_frames_train_the_cross_branch_alone() -> None:
    model = trained()
    apply_freezing(model, new_parts(model))
    model.predict(*given(frames=1)).square().mean().backward()
    learning = {n.split(".")[2] for n, p in model.temporal.named_parameters() if p.grad is not None}
    assert learning == {"to_q_cross", "to_out_context"}


def test_rotation_is_in_float32_in_a_model_of_half_precision() -> None:
    model, (sample, timestep, conditions) = trained(), given()
    with torch.no_grad():
        whole = model.predict(sample, timestep, conditions)
        half = model.to(torch.bfloat16).predict(sample, timestep, conditions)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.1 * whole.abs().max()


@torch.no_grad()
def test_every_kernel_computes_the_same_and_keeps_the_branches() -> None:
    model, given_ = trained(), given()
    expected = model.predict(*given_)
    assert len(attention_layers(model, temporal=False)) == DEPTH
    backends: tuple[AttentionBackend, ...] = ("eager", "sdpa")
    for backend in backends:
        set_attention_backend(model, backend, temporal=False)
        set_attention_backend(model, backend, temporal=True)
        torch.testing.assert_close(model.predict(*given_), expected, rtol=1e-4, atol=1e-5)
    assert {layer.processor.backend for layer in attention_layers(model, temporal=False)} == {"sdpa"}
    with pytest.MonkeyPatch.context() as patch:
        # More sequences over frames than a kernel takes at once.
        patch.setattr(attention_module, "MAX_BATCH", 7)
        torch.testing.assert_close(model.predict(*given_), expected, rtol=1e-4, atol=1e-5)


def test_transformers_without_this_block_are_refused_by_name() -> None:
    for changes, name in (
        ({"qk_norm": "rms_norm"}, "qk_norm"),
        ({"dual_attention_layers": (0, 1)}, "dual_attention_layers"),
        ({"attention_head_dim": 5, "num_attention_heads": 4, "caption_projection_dim": 20}, "attention_head_dim"),
    ):
        with pytest.raises(MobiusError, match=name):
            SerialSD3.from_sd3(transformer(**changes))
    with pytest.raises(MobiusError, match="num_layers"):
        SerialSD3(transformer(num_layers=2), VchitectLayers.of(transformer()))


def test_units_have_every_layer_once() -> None:
    model = trained()
    units = [module for unit in model.units() for module in unit]
    assert len(units) == len(set(units)) == 2 * DEPTH
    inside = {id(p) for module in units for p in module.parameters()}
    assert not [n for n, p in model.temporal.named_parameters() if id(p) not in inside]
