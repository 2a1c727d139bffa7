"""Conversion of Vchitect-2.0's released weights, by a made checkpoint with their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.convert.vchitect import from_vchitect, to_vchitect
from mobius_train.errors import MobiusError
from mobius_train.models.sd3.serial import SerialSD3

DEPTH, WIDTH = 2, 16
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": DEPTH,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 7,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}
# models/attention.py of github.com/Vchitect/Vchitect-2.0, class Attention.
ADDED = (
    "to_q_temp",
    "to_k_temp",
    "to_v_temp",
    "to_q_cross",
    "to_out_temporal",
    "to_add_out_temporal",
    "to_out_context",
)
UNUSED = f"transformer_blocks.{DEPTH - 1}.attn.to_add_out_temporal."


def released_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = SD3Transformer2DModel(**CONFIG).state_dict()
    for block in range(DEPTH):
        for name in ADDED:
            state[f"transformer_blocks.{block}.attn.{name}.weight"] = torch.randn(WIDTH, WIDTH)
            state[f"transformer_blocks.{block}.attn.{name}.bias"] = torch.randn(WIDTH)
    return state


def save_released(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS)
    entries = {"_class_name": "VchitectXLTransformerModel", "tp_size": 1, "rope_scaling_factor": 1.0}
    (folder / "config.json").write_text(json.dumps(entries | CONFIG | changes))
    return folder


def prediction(model: SerialSD3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {TEXT: torch.randn(2, 3, 10, generator=generator), POOLED: torch.randn(2, 7, generator=generator)}
    sample = torch.randn(2, 4, 3, 4, 6, generator=generator)
    with torch.no_grad():
        return model.predict(sample, torch.tensor([17.0, 801.0]), Conditions(given))


def test_released_weights_go_there_and_back(tmp_path: Path) -> None:
    state = released_state()
    source = save_released(tmp_path / "released", state)
    report = from_vchitect(source, tmp_path / "ours")
    assert [name for name, _ in report.left_out] == [UNUSED.removesuffix(".")]
    model = SerialSD3.from_pretrained(tmp_path / "ours")
    assert model.temporal.config.spatial_scale == 1.1
    for block in range(DEPTH):
        for name, own in model.temporal.blocks[block].named_parameters():
            assert torch.equal(own, state[f"transformer_blocks.{block}.attn.{name}"])
    for name, own in model.transformer.state_dict().items():
        assert torch.equal(own, state[name])

    assert [name for name, _ in to_vchitect(tmp_path / "ours", tmp_path / "back").made] == [UNUSED.removesuffix(".")]
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == state.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name.startswith(UNUSED) else state[name]), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.pop("_diffusers_version")
    assert config == json.loads((source / "config.json").read_text())


def test_a_pipeline_s_transformer_is_taken(tmp_path: Path) -> None:
    # The name of the class of which it is a variant does as well: the weights decide.
    save_released(tmp_path / "pipeline" / "transformer", released_state(), _class_name="SD3Transformer2DModel")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    from_vchitect(tmp_path / "pipeline", tmp_path / "ours")
    assert SerialSD3.from_pretrained(tmp_path / "ours").config.num_layers == DEPTH


def test_a_model_of_another_scale_predicts_the_same_with_the_released_one(tmp_path: Path) -> None:
    model = SerialSD3.from_sd3(SD3Transformer2DModel(**CONFIG))
    torch.manual_seed(2)
    for parameter in model.temporal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "ours")
    assert to_vchitect(tmp_path / "ours", tmp_path / "released").notes
    from_vchitect(tmp_path / "released", tmp_path / "again")
    again = SerialSD3.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(prediction(again), prediction(model), rtol=1e-4, atol=1e-5)
    # Without the scaled projections it would not.
    again.transformer.load_state_dict(model.transformer.state_dict())
    assert not torch.allclose(prediction(again), prediction(model), rtol=1e-2, atol=1e-2)


def test_what_is_missing_left_over_or_different_is_refused_by_name(tmp_path: Path) -> None:
    state = released_state()
    lost = "transformer_blocks.0.attn.to_q_cross.weight"
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({name: tensor for name, tensor in state.items() if name != lost}, {}, lost),
        (state | {"transformer_blocks.0.attn.vid_token": torch.ones(1)}, {}, "vid_token"),
        (state | {lost: torch.ones(3, WIDTH)}, {}, lost),
        (state, {"rope_scaling_factor": 2.0}, "rope_scaling_factor"),
        (state, {"qk_norm": "rms_norm"}, "qk_norm"),
        (state, {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ]
    for number, (weights, changes, complaint) in enumerate(cases):
        source = save_released(tmp_path / str(number), weights, **changes)
        with pytest.raises(MobiusError, match=complaint):
            from_vchitect(source, tmp_path / "out")
    with pytest.raises(MobiusError, match="VchitectXLTransformerModel"):
        to_vchitect(save_released(tmp_path / "released", state), tmp_path / "out")
    image = tmp_path / "image"
    SD3Transformer2DModel(**CONFIG).save_pretrained(image / "transformer")
    (image / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "SD3Transformer2DModel"]}))
    with pytest.raises(MobiusError, match=r"image has a SD3Transformer2DModel, but only a SerialSD3"):
        to_vchitect(image, tmp_path / "out")
    assert not (tmp_path / "out").exists()
