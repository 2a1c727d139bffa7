"""Conversion of our serial layers to diffusers' UNet3DConditionModel; the inverse is SerialUNet.from_unet3d."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor

from mobius_train.errors import MobiusError
from mobius_train.models.unet.layers import read_layout

# Options with another form in UNet3DConditionModel, or without an effect on the weights.
TRANSLATED = {
    "down_block_types",
    "up_block_types",
    "attention_head_dim",
    "mid_block_type",
    "use_linear_projection",
    "upcast_attention",
}


def to_unet3d(unet: UNet2DConditionModel, temporal: Mapping[str, Tensor]) -> UNet3DConditionModel:
    """Combine 2D layers and temporal layers (named as in UNet3DConditionModel) in one model.

    Projections that are 1x1 convolutions become equivalent linear layers.

    Raises:
        MobiusError: diffusers' class cannot represent this UNet.
    """
    model = UNet3DConditionModel(**_config3d(unet)).eval().requires_grad_(False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    spatial = {
        name: tensor.reshape(shapes[name]) if _is_projection(name, tensor, shapes) else tensor
        for name, tensor in unet.state_dict().items()
    }
    model.load_state_dict({**spatial, **temporal}, strict=True)
    return model


def _is_projection(name: str, tensor: Tensor, shapes: dict[str, Any]) -> bool:
    linear = ("proj_in.weight", "proj_out.weight")
    return name.endswith(linear) and tensor.ndim == 4 and name in shapes and len(shapes[name]) == 2


def _config3d(unet: UNet2DConditionModel) -> dict[str, Any]:
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    known = set(inspect.signature(UNet3DConditionModel.__init__).parameters) - {"attention_head_dim"}
    defaults = inspect.signature(UNet2DConditionModel.__init__).parameters
    problems = [
        f"{name}={value!r}: it has no such option and behaves as with {defaults[name].default!r}"
        for name, value in config.items()
        if name in defaults and name not in known | TRANSLATED and value != defaults[name].default
    ]
    if config["mid_block_type"] is None:
        problems.append("mid_block_type=None: it always has a middle block")
    if config["act_fn"] != "silu":
        problems.append(f"act_fn={config['act_fn']!r}: its output head uses silu")
    if not isinstance(config["layers_per_block"], int):
        problems.append(f"layers_per_block={config['layers_per_block']!r}: it has the same number in all blocks")
    sizes = {shape.channels // shape.heads for shape in read_layout(config).layers() if shape.heads is not None} | {
        config["block_out_channels"][0] // read_layout(config).in_heads
    }
    if len(sizes) != 1:
        problems.append(
            f"attention heads of sizes {sorted(sizes)}: all its heads have one size (Stable Diffusion 2.x: 64)"
        )
    if problems:
        raise MobiusError(
            "diffusers' UNet3DConditionModel cannot represent this UNet:\n  - "
            + "\n  - ".join(problems)
            + "\nUse it with mobius_train.pipeline.TextToVideoPipeline instead"
        )
    own = {name: value for name, value in config.items() if name in known}
    return own | {
        "down_block_types": tuple(kind.replace("2D", "3D") for kind in config["down_block_types"]),
        "up_block_types": tuple(kind.replace("2D", "3D") for kind in config["up_block_types"]),
        "attention_head_dim": sizes.pop(),
    }
