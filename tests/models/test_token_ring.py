"""The ring beside a transformer: its equations, and the invariants of every ring."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from autograd_memory import held_for_backward, result_and_held, watched
from kinds import DTYPES, quick_first
from learning import idle, loss, train
from token_models import KINDS, Batch, batch_for, cast, tiny_model, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from mobius_train.conditions import TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelSD3, ParallelUNet, build_denoiser, offload
from mobius_train.models.attention import attention_layers, set_attention_backend
from mobius_train.models.backbone import fold_conditions, fold_frames, unfold_frames, without_graph
from mobius_train.models.compiling import compile_layers
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.tokens.layers import Clip, TokenLayer
from mobius_train.models.tokens.ring import TokenRing
from mobius_train.models.tokens.state import Tokens
from mobius_train.ring_shape import PAPER, RingShape
from mobius_train.storages import StorageFollower, module_storages

# Four blocks: one of each pair has a layer by default.
SHAPES = [
    PAPER,
    RingShape(ring_every=1, context_latents=3),
    RingShape(0.5),
    RingShape(1.0, 2),
    RingShape(0.5, 1, tail_temporal_layers=True, ring_every=3),
    RingShape(0.0, 2, tail_temporal_layers=True, context_latents=2),
    RingShape(0.5, 2, trained_tail=True),
    RingShape(0.0, 1, tail_temporal_layers=True, trained_tail=True),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
kinds = pytest.mark.parametrize("kind", quick_first(KINDS, "sd3", "pixart"))
# The default shape of every kind, and every other shape on one of them.
cases = pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, PAPER) for kind in KINDS), *zip(KINDS + KINDS, SHAPES[1:], strict=False)],
    ids=str,
)
KEPT, RECOMPUTED = LayerMemory(), LayerMemory(gradient_checkpointing=True)


def built(shape: RingShape = PAPER, kind: str = "sd3") -> Any:
    fields = {name: value for name, value in vars(shape).items() if value is not None}
    torch.manual_seed(2)
    return build_denoiser(tiny_model(kind), "text-to-video", "parallel", fields)


def randomised(model: Any) -> Any:
    """As after training: nothing is zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.ring.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model


def stills(model: Any, batch: Batch) -> Tensor:
    return unfold_frames(untouched(model.spatial, batch), batch.sample.shape[2])


# The equations.


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Of (queries, D), (keys, D) and (keys, D), head by head."""
    size = query.shape[-1] // heads
    parts = []
    for head in range(heads):
        of = slice(head * size, (head + 1) * size)
        scores = query[:, of] @ key[:, of].T / math.sqrt(size)
        parts.append(scores.softmax(-1) @ value[:, of])
    return torch.cat(parts, dim=-1)


def normed(x: Tensor, heads: int, weight: Tensor) -> Tensor:
    """Each head by itself, (rows, D)."""
    size = x.shape[-1] // heads
    return torch.cat([F.layer_norm(part, (size,), weight, eps=1e-6) for part in x.split(size, -1)], dim=-1)


def rotated(x: Tensor, heads: int) -> Tensor:
    """(F, D): the pair j of each head, turned by frame · 10000^(-2j/size)."""
    size = x.shape[-1] // heads
    turned = torch.empty_like(x)
    for frame in range(len(x)):
        for first in range(0, x.shape[-1], 2):
            angle = frame * 1e4 ** (-(first % size) / size)
            a, b = x[frame, first], x[frame, first + 1]
            turned[frame, first] = a * math.cos(angle) - b * math.sin(angle)
            turned[frame, first + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def plain_layer(layer: Any, state: Tensor, text: Tensor, modulation: Tensor, frames: int, grid: tuple[int, int]) -> Any:
    """Δ(t) with loops over clips, frames and positions, from the equations in `tokens/layers.py`."""
    heads, (count, positions, width) = layer.frames.heads, state.shape
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + layer.table)[:, :, None].unbind(1)
    u = F.layer_norm(state, (width,), eps=1e-6) * (1 + scale1) + shift1

    over_frames, to_text, mixed = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u)
    for clip in range(count // frames):
        own = slice(clip * frames, (clip + 1) * frames)
        for position in range(positions):
            q, k, v = (p(u[own, position]) for p in (layer.frames.to_q, layer.frames.to_k, layer.frames.to_v))
            q, k = normed(q, heads, layer.frames.norm_q.weight), normed(k, heads, layer.frames.norm_k.weight)
            result = attention(rotated(q, heads), rotated(k, heads), v, heads)
            over_frames[own, position] = layer.frames.to_out[0](result)
        source = F.layer_norm(text[clip], text.shape[-1:], eps=1e-6)
        if layer.latents is not None:
            source = torch.cat([source, layer.latents])
        key = normed(layer.text.to_k(source), heads, layer.text.norm_k.weight)
        for frame in range(clip * frames, (clip + 1) * frames):
            query = normed(layer.text.to_q(u[frame]), heads, layer.text.norm_q.weight)
            result = attention(query, key, layer.text.to_v(source), heads)
            to_text[frame] = layer.text.to_out[0](result)
        # 27 shifted copies.
        padded = F.pad(u[own].reshape(frames, *grid, width), (0, 0, 1, 1, 1, 1, 1, 1))
        weight, total = layer.mixing.convolution.weight, layer.mixing.convolution.bias.expand(frames, *grid, width)
        for f in range(3):
            for y in range(3):
                for x in range(3):
                    moved = padded[f : f + frames, y : y + grid[0], x : x + grid[1]]
                    total = total + weight[:, 0, f, y, x] * moved
        mixed[own] = layer.mixing.projection(F.silu(total)).reshape(frames, positions, width)

    y = (1 + gate1) * (over_frames + to_text + mixed)
    second = F.layer_norm(state + y, (width,), eps=1e-6) * (1 + scale2) + shift2
    wide, _, narrow = layer.feed_forward.net
    return y + (1 + gate2) * narrow(F.gelu(wide.proj(second), approximate="tanh"))


@pytest.mark.parametrize("latents", [0, 2])
@torch.no_grad()
def test_a_layer_is_that_of_the_equations(latents: int) -> None:
    torch.manual_seed(0)
    layer = TokenLayer(16, 2, 12, latents, entering=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    state, text, modulation = torch.randn(6, 8, 16), torch.randn(2, 5, 12), 0.3 * torch.randn(6, 6, 16)
    expected = plain_layer(layer, state, text, modulation, 3, (2, 4))
    torch.testing.assert_close(layer(state, None, text, modulation, Clip(3, (2, 4))), expected, rtol=1e-4, atol=1e-5)
    # The control: the same frames as three clips, and the grid turned.
    for clip, texts in ((Clip(2, (2, 4)), text[[0, 0, 1]]), (Clip(3, (4, 2)), text)):
        assert not torch.allclose(layer(state, None, texts, modulation, clip), expected, atol=1e-2)


@pytest.mark.parametrize("latents", [0, 2])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attn"])
@torch.no_grad()
def test_a_layer_does_not_attend_to_padding(latents: int, backend: Any) -> None:
    torch.manual_seed(0)
    layer = TokenLayer(16, 2, 12, latents, entering=False)
    # The frames' attention has no mask.
    layer.text.set_processor(type(layer.text.processor)(backend))
    state, text, modulation = torch.randn(6, 8, 16), torch.randn(2, 5, 12), 0.3 * torch.randn(6, 6, 16)
    bias = -1e4 * (torch.arange(5) >= 3).float().expand(2, 1, 5)
    masked = layer(state, None, text, modulation, Clip(3, (2, 4), bias))
    if backend != "flash_attn":
        expected = layer(state, None, text[:, :3], modulation, Clip(3, (2, 4)))
        torch.testing.assert_close(masked, expected)
        assert not torch.allclose(layer(state, None, text, modulation, Clip(3, (2, 4))), expected, atol=1e-4)
    text[:, 3:] = 7.0
    torch.testing.assert_close(layer(state, None, text, modulation, Clip(3, (2, 4), bias)), masked)


@pytest.mark.parametrize("shape", [PAPER, SHAPES[1], SHAPES[5]], ids=str)
@torch.no_grad()
def test_padding_of_the_text_changes_no_prediction(shape: RingShape) -> None:
    model = randomised(built(shape, "pixart"))
    sample, timestep, conditions = batch_for(model.spatial).given()
    before = model.predict(sample, timestep, conditions)
    # The second clip has one token of padding, the first has none.
    text = conditions[TEXT].clone()
    text[:, -1] += 1
    after = model.predict(sample, timestep, conditions | Conditions.of_text(text))
    torch.testing.assert_close(before[1], after[1])
    assert not torch.allclose(before[0], after[0], atol=1e-4)


@torch.no_grad()
def test_the_ring_adds_up_its_layers() -> None:
    model = randomised(built(RingShape(ring_every=2)))
    ring, batch = model.ring, batch_for(model.spatial)
    features = list(features_of(model, batch))
    modulation = ring.modulation(features[0].time)
    difference = torch.zeros_like(features[0].hidden)
    for number, layer in zip((2, 4), ring.blocks, strict=True):
        state = features[number]
        first = state.text[::3]
        difference = difference + layer(state.hidden + difference, None, first, modulation, Clip(3, state.grid))
    last = features[-1]._replace(hidden=features[-1].hidden + ring.fusion(difference))
    expected = ring._head(last.hidden, last.time, last.grid)
    torch.testing.assert_close(fold_frames(model.predict(*batch.given())), expected)


@torch.no_grad()
def test_only_the_text_of_a_clips_first_frame_is_read() -> None:
    model = randomised(built())
    batch = batch_for(model.spatial)
    features = list(features_of(model, batch))

    def prediction(changed: list[int]) -> Tensor:
        texts = [feature.text.clone() for feature in features]
        for text in texts:
            text[changed] = text[changed].flip(-1)
        return model.ring([f._replace(text=t) for f, t in zip(features, texts, strict=True)], num_frames=3)

    assert torch.equal(prediction([1, 2, 4, 5]), prediction([]))
    of_second = prediction([3])
    assert torch.equal(of_second[:3], prediction([])[:3])
    assert not torch.allclose(of_second[3:], prediction([])[3:], atol=1e-4)


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix_and_frames_do() -> None:
    model = randomised(built())
    batch = batch_for(model.spatial)
    before = model.predict(*batch.given())
    changed = batch.sample.clone()
    changed[1, :, 2] += 1
    after = model.predict(changed, *batch.given()[1:])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1, :, 0], after[1, :, 0], atol=1e-4)
    # Frames have an order: reversed clips are not the reversed prediction.
    reversed_clips = model.predict(batch.sample.flip(2), *batch.given()[1:]).flip(2)
    assert not torch.allclose(before, reversed_clips, atol=1e-4)


# The invariants.


@cases
def test_a_new_model_predicts_what_the_transformer_predicts(kind: str, shape: RingShape) -> None:
    model = built(shape, kind)
    batch = batch_for(model.spatial, size=(6, 14))
    with torch.no_grad():
        assert torch.equal(model.predict(*batch.given()), stills(model, batch))
        # The control: with trained layers it predicts something else.
        assert not torch.allclose(randomised(model).predict(*batch.given()), stills(model, batch), atol=1e-3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_predicts_the_same_in_any_dtype(dtype: torch.dtype, kind: str) -> None:
    model = built(kind=kind).to(dtype)
    sample, timestep, conditions = batch_for(model.spatial).given()
    batch = cast(batch_for(model.spatial), dtype)._replace(timestep=timestep)
    assert torch.equal(model.predict(sample.to(dtype), timestep, conditions.to(dtype=dtype)), stills(model, batch))


@cases
def test_every_parameter_learns_and_the_graph_holds_no_frozen_one(kind: str, shape: RingShape) -> None:
    model = built(shape, kind)
    batch = batch_for(model.spatial)
    assert idle(train(model, batch, steps=2)) == set()
    for memory in (KEPT, RECOMPUTED):
        model.set_memory(memory)
        assert {id(leaf) for leaf in leaves_of_graph(loss(model, batch))} == set(map(id, model.ring.parameters()))
    assert all(parameter.grad is None for parameter in model.spatial.parameters())


@kinds
def test_at_the_first_step_only_fusion_and_head_learn(kind: str) -> None:
    # The control of the test above: its check finds parameters that do not learn.
    model = built(kind=kind)
    gradients = train(model, batch_for(model.spatial), steps=0)
    learning = gradients.keys() - idle(gradients)
    assert {name.split(".")[0] for name in learning} == {
        "fusion",
        "scale_shift_table" if kind.startswith("pixart") else "norm_out",
        "proj_out",
    }


@shapes
def test_only_blocks_behind_the_fusion_save_tensors(shape: RingShape) -> None:
    model = built(shape)
    batch = batch_for(model.spatial)
    blocks = len(model.spatial.transformer_blocks)
    names = [f"spatial.transformer_blocks.{number}" for number in range(blocks - shape.fusion_depth, blocks)]
    copies = {f"ring.tail.{number}" for number in range(shape.fusion_depth)} if shape.trained_tail else set()
    saved = saved_for_backward(lambda: loss(model, batch), {"": model})[1].tensors
    found = {".".join(name.split(".")[:3]) for name in saved if name.startswith(("spatial", "ring.tail."))}
    assert found == (copies or set(names))
    assert sum(saved.values()) > 100
    frozen = [name for name, module in model.named_modules() if module in model.frozen_in_graph()]
    assert frozen == ([] if copies else names)


def features_of(model: Any, batch: Batch) -> Iterator[Tokens]:
    sample, timestep, conditions = batch.given()
    folded = fold_frames(sample), *fold_conditions(timestep, conditions, sample.shape[2])
    return without_graph(model.backbone.features(*folded))


@kinds
@pytest.mark.parametrize("memory", [KEPT, RECOMPUTED], ids=["kept", "recomputed"])
def test_nothing_that_the_transformer_computed_outlives_the_forward_pass(kind: str, memory: LayerMemory) -> None:
    model, live = randomised(built(kind=kind)), StorageFollower()
    model.set_memory(memory)
    output = model.ring(watched(features_of(model, batch_for(model.spatial)), live), num_frames=3)
    alive = {storage._cdata for storage, _ in live.alive()} - module_storages(model.spatial)
    # A recomputed projection of the embedded time takes it again.
    assert len(alive) == (1 if memory == RECOMPUTED else 0)
    output.sum().backward()


def most_alive(features: Iterator[Tokens], consume: Callable[[Iterator[Tokens]], object]) -> int:
    """How many states of image tokens live at once."""
    references: list[weakref.ref] = []
    most = 0

    def counted() -> Iterator[Tokens]:
        nonlocal most
        for feature in features:
            references.append(weakref.ref(feature.hidden))
            most = max(most, sum(reference() is not None for reference in references))
            yield feature
            del feature

    consume(counted())
    return most


def test_features_are_freed_in_lockstep() -> None:
    model = built()
    batch = batch_for(model.spatial)
    assert most_alive(features_of(model, batch), lambda features: model.ring(features, num_frames=3)) <= 2
    assert most_alive(features_of(model, batch), lambda features: model.ring(list(features), num_frames=3)) == 5


# Memory options and dtypes.

OPTIONS = {
    "recomputed": (RECOMPUTED, 0.2),
    "half kept": (LayerMemory(True, gradient_checkpointing_kept=0.5), 0.75),
    "activations": (LayerMemory(recompute_activations=True), 0.85),
    "half with activations": (LayerMemory(True, 0.5, recompute_activations=True), 0.65),
}


@pytest.mark.parametrize(("kind", "shape"), zip(KINDS + KINDS, SHAPES, strict=False), ids=str)
def test_options_change_the_memory_and_not_the_numbers(kind: str, shape: RingShape) -> None:
    model = randomised(built(shape, kind))
    batch = batch_for(model.spatial, frames=4)

    def step(memory: LayerMemory) -> tuple[int, dict[str, Tensor]]:
        """Bytes held for the backward pass, and the gradients by name."""
        model.set_memory(memory)
        model.zero_grad()
        prediction, held = result_and_held(lambda: model.predict(*batch.given()), model)
        prediction.square().mean().backward()
        return held, {name: p.grad.clone() for name, p in model.ring.named_parameters()}

    all_kept, expected = step(KEPT)
    for option, (memory, share) in OPTIONS.items():
        held, gradients = step(memory)
        assert held < (share if share < 0.7 or not shape.fusion_depth else 0.9) * all_kept, option
        assert [name for name in expected if not torch.equal(expected[name], gradients[name])] == [], option


def test_layers_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    model = randomised(built())
    batch = batch_for(model.spatial)
    loss(model, batch).backward()
    expected = {name: p.grad.clone() for name, p in model.ring.named_parameters()}
    model.zero_grad()
    model.set_memory(LayerMemory(activation_offload=1.0))
    value = loss(model, batch)
    assert model.ring.host_bytes > 20 * 2 * (6 * 16 * 32 * 4)
    value.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.ring.named_parameters())


def test_a_recomputed_layer_keeps_one_state_and_the_first_frames_text() -> None:
    model = built(RingShape(ring_every=1))
    model.set_memory(RECOMPUTED)
    batch = batch_for(model.spatial, tokens=50)
    more = batch_for(model.spatial, tokens=51)
    held = [held_for_backward(lambda b=b: model.predict(*b.given()), model) for b in (batch, more)]  # type: ignore[misc]
    # Four layers keep (B, L, D) each; the rest is the batch, (B, L, 24).
    assert held[1] - held[0] == 4 * 2 * 32 * 4 + 2 * 24 * 4
    state, entry = 6 * 16 * 32 * 4, 6 * (32 + 6 * 32) * 4
    text = 50 * (held[1] - held[0])
    # t in each layer; d, and the sum with it, in the head.
    assert held[0] - text - entry <= 7 * state


@DTYPES
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_dtypes_of_the_branches_are_their_own(
    frozen: torch.dtype, trained: torch.dtype, autocast: bool, shape: RingShape
) -> None:
    model = randomised(built(shape))
    batch = batch_for(model.spatial)
    exact = model.predict(*batch.given()).detach()
    model.spatial.to(frozen)
    model.ring.to(trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model.predict(*batch.given())
    assert prediction.dtype == (torch.bfloat16 if autocast else trained)
    assert (prediction.float() - exact).norm() < 0.05 * exact.norm()
    prediction.float().square().mean().backward()
    assert all(parameter.grad.dtype == trained for parameter in model.ring.parameters())


def test_attention_takes_the_backend_of_temporal_layers() -> None:
    model = randomised(built())
    batch = batch_for(model.spatial)
    expected = model.predict(*batch.given())
    temporal = attention_layers(model, temporal=True)
    assert temporal == [layer for block in model.ring.blocks for layer in (block.frames, block.text)]
    set_attention_backend(model, "eager", temporal=True)
    assert {layer.processor.backend for layer in temporal} == {"eager"}
    torch.testing.assert_close(model.predict(*batch.given()), expected)


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    model = randomised(built(SHAPES[4]))
    batch = batch_for(model.spatial)
    expected = model.predict(*batch.given())
    compile_layers(model.layers_to_compile(), backend="aot_eager")
    torch.testing.assert_close(model.predict(*batch.given()), expected)
    loss(model, batch).backward()


def test_the_costs_of_layers_follow_their_width() -> None:
    ring = built(RingShape(0.5, 2, tail_temporal_layers=True, ring_every=1)).ring
    assert len(ring._costs) == 4
    # A narrow layer saves more for a multiplication, and a block with a temporal layer more than one without.
    assert ring._costs[0] > ring._costs[-1] > built(RingShape(1.0, 2)).ring._costs[-1]
    assert ring.set_memory(LayerMemory(True, 0.5)) is None
    assert ring.treatments == ("recompute", "recompute", "recompute", "keep", "keep", "recompute")


# Shapes.


@pytest.mark.parametrize(
    ("shape", "places"),
    [
        (PAPER, [2, 4]),
        (RingShape(ring_every=1), [1, 2, 3, 4]),
        (RingShape(ring_every=3), [3, 4]),
        (RingShape(ring_every=4), [4]),
        (RingShape(1.0, 1), [2, 3]),
        (RingShape(1.0, 3), [1]),
        (RingShape(0.0, 4, tail_temporal_layers=True), []),
    ],
    ids=str,
)
def test_layers_come_behind_every_kth_block_and_the_last_one(shape: RingShape, places: list[int]) -> None:
    ring: TokenRing = ParallelSD3.from_transformer(tiny_model(), shape).ring
    assert ring._places == places
    assert len(ring.units()) == len(places) + (shape.fusion_depth if shape.tail_temporal_layers else 0)


def test_half_the_width_has_half_of_the_heads_and_a_third_of_the_weights() -> None:
    whole, half = (ParallelSD3.from_transformer(tiny_model(), RingShape(width)).ring for width in (1.0, 0.5))
    layer: Any = half.blocks[0]
    assert layer.frames.heads == 2
    assert layer.frames.inner_dim == 16
    sizes = [sum(p.numel() for p in ring.blocks.parameters()) for ring in (half, whole)]
    assert 0.25 < sizes[0] / sizes[1] < 0.45


def test_a_shape_that_does_not_fit_is_refused_with_those_that_do() -> None:
    for shape, named in (
        (RingShape(0.3), r"ring_width=0\.3: 4 heads.*0\.5, 0\.25"),
        (RingShape(1.0, 4), "fusion_depth=4: this transformer has 4 blocks.*0 to 3"),
        (RingShape(1.0, -1), "fusion_depth=-1"),
        (RingShape(0.0, 5, tail_temporal_layers=True), "fusion_depth=5.*0 to 4"),
        (RingShape(ring_every=5), "ring_every=5.*1 to 4"),
        (RingShape(1.0, 2, ring_every=3), "ring_every=3.*1 to 2"),
        (RingShape(ring_every=0), "ring_every=0.*1 to 4"),
        (RingShape(context_latents=-1), "context_latents=-1"),
    ):
        with pytest.raises(MobiusError, match=named):
            ParallelSD3.from_transformer(tiny_model(), shape)


def test_fields_of_transformers_are_refused_for_a_unet() -> None:
    from unets import tiny_unet

    for fields, named in (({"ring_every": 2}, "ring_every=2"), ({"context_latents": 4}, "context_latents=4")):
        with pytest.raises(MobiusError, match=f"{named}: rings of a UNet"):
            build_denoiser(tiny_unet("emoji"), "text-to-video", "parallel", fields)
    assert isinstance(build_denoiser(tiny_unet("emoji"), "text-to-video", "parallel"), ParallelUNet)


def test_a_field_without_a_ring_to_count_for_is_refused() -> None:
    with pytest.raises(MobiusError, match=r"ring_every=2 has no effect.*ring_width=0"):
        RingShape(0.0, 2, tail_temporal_layers=True, ring_every=2)


def test_the_familys_default_differs_from_no_value_of_its_own() -> None:
    assert PAPER.different(vars(RingShape(ring_every=2))) == RingShape(ring_every=2).different(vars(PAPER)) == {}
    assert RingShape(ring_every=1).different(vars(RingShape(ring_every=2))) == {"ring_every": 1}
    assert PAPER.different(vars(RingShape(0.5, context_latents=1))) == {"ring_width": 1.0, "context_latents": 0}


def test_training_goes_on_with_the_models_own_shape() -> None:
    model = ParallelSD3.from_transformer(tiny_model(), RingShape(context_latents=2))
    for given in ({}, {"ring_every": 2}, {"ring_every": 2, "context_latents": 2}):
        build_denoiser(model, "text-to-video", "parallel", given)
    for given, named in (({"ring_every": 1}, "ring_every=1.*2"), ({"context_latents": 0}, "context_latents=0.*2")):
        with pytest.raises(MobiusError, match=named):
            build_denoiser(model, "text-to-video", "parallel", given)
