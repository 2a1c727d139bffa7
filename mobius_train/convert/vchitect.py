"""Conversion between the released transformer of Vchitect-2.0 and SerialSD3.

Both have the same weights. The released model keeps the projections of a block's branches in the block's attention,
next to SD3's own, and SerialSD3 keeps them in a part of their own:

    transformer_blocks.<i>.attn.<projection>.<weight or bias>  ↔  temporal: blocks.<i>.<projection>.<weight or bias>
    any other name                                             ↔  transformer: the same name
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.convert.components import is_pipeline
from mobius_train.convert.conversion_report import Report
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import weights_hash
from mobius_train.models.sd3.serial import SerialSD3
from mobius_train.models.sd3.vchitect import VchitectBranches, VchitectLayers
from mobius_train.pretrained.model_files import CONFIG, read_json
from mobius_train.pretrained.strict_load import load_diffusers

# The factor of the spatial attention in the released code.
RELEASED_SCALE = 1.1
# The released code reads one file only.
ONE_FILE = "1000GB"
UNUSED = "to_add_out_temporal"
WITHOUT_EFFECT = "the last block's text output is not used"


class VchitectXLTransformerModel(ModelMixin, ConfigMixin):
    """The released model's names and shapes, for reading and writing. It cannot be called.

    The arguments are those of SD3Transformer2DModel, and two that change no weight.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        tp_size: int = 1,
        rope_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        transformer = SD3Transformer2DModel(**_sd3_config(self.config))
        for block in transformer.transformer_blocks:
            added = VchitectBranches(transformer.inner_dim, num_attention_heads, last=False, spatial_scale=1.0)
            for name, projection in added.named_children():
                block.attn.add_module(name, projection)
        for name, part in transformer.named_children():
            self.add_module(name, part)


def from_vchitect(source: Path, destination: Path) -> Report:
    """Convert the released transformer to a SerialSD3 with `spatial_scale` 1.1, which computes the same for one clip.

    Args:
        source: folder of the transformer, or of its pipeline.
        destination: folder of the SerialSD3.

    Raises:
        MobiusError: the source is damaged or of another kind, or a weight is missing, unexpected or of another shape.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        place = source / "transformer" if is_pipeline(source) else source
        _check_config(place)
        released: Any = load_diffusers(VchitectXLTransformerModel, place, also_named=(SD3Transformer2DModel.__name__,))
        model = _to_serial(released)
        model.save_pretrained(folder)
        _report_parts(report, model, "{part}")
        report.left_out.append((_last_unused(model), WITHOUT_EFFECT))
        _check_written(report, SerialSD3.from_pretrained(folder), model)
        report.notes.append(
            "to train or sample it, put this folder in the place of its pipeline's transformer folder, and see"
            " mode=serial and mode=full"
        )
        report.raise_problems()
    return report


def to_vchitect(source: Path, destination: Path) -> Report:
    """Convert a SerialSD3 to the released transformer, whose code then predicts the same for one clip.

    The released code has the factor 1.1 for the spatial attention. For a model of another `spatial_scale` the
    projections around it are scaled instead.

    Args:
        source: folder of the SerialSD3, or of its pipeline, such as a run's final/.
        destination: folder of the transformer, in one file.

    Raises:
        MobiusError: the source is damaged or of another kind.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        # A SerialSD3 alone has the folders of its parts, as a pipeline has.
        pipeline = is_pipeline(source)
        model = load_image_or_video_model(None, str(source)) if pipeline else SerialSD3.from_pretrained(source)
        if not isinstance(model, SerialSD3):
            raise MobiusError(
                f"{source} has a {type(model).__name__}, but only a {SerialSD3.__name__}, which mode=serial and"
                " mode=full train beside Stable Diffusion 3, has Vchitect's block"
            )
        scale = float(model.temporal.config.spatial_scale)
        released = _to_released(model)
        released.save_pretrained(folder, max_shard_size=ONE_FILE)
        _report_parts(report, model, "transformer")
        report.made.append((_last_unused(model), f"zeros: {WITHOUT_EFFECT}"))
        _check_written(report, load_diffusers(VchitectXLTransformerModel, folder), released)
        if scale != RELEASED_SCALE:
            report.notes.append(
                f"spatial_scale was {scale:g}: to_out and to_add_out are multiplied by {scale / RELEASED_SCALE:.6g},"
                f" and to_out_context is divided by it, so the released code with its factor {RELEASED_SCALE} predicts"
                " the same up to rounding"
            )
        report.raise_problems()
    return report


def _to_serial(released: VchitectXLTransformerModel) -> SerialSD3:
    """The same model, with the weights of `released` and not copies."""
    state = released.state_dict()
    # Without weights of their own, until those of the released model are assigned.
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**_sd3_config(released.config))
        temporal = VchitectLayers.of(transformer, RELEASED_SCALE)
    temporal.load_state_dict({name: state.pop(_released_name(name)) for name in temporal.state_dict()}, assign=True)
    names = transformer.state_dict().keys()
    transformer.load_state_dict({name: state[name] for name in names}, assign=True)
    return SerialSD3(transformer, temporal).eval()


def _to_released(model: SerialSD3) -> VchitectXLTransformerModel:
    """The same model for code with the factor 1.1."""
    temporal = {_released_name(name): tensor for name, tensor in model.temporal.state_dict().items()}
    state = _rescaled(
        model.transformer.state_dict() | temporal, float(model.temporal.config.spatial_scale) / RELEASED_SCALE
    )
    with torch.device("meta"):
        released = VchitectXLTransformerModel(**_sd3_config(model.transformer.config))
    like = model.temporal.blocks[-1].to_out_temporal
    for name, tensor in cast(nn.Linear, like).state_dict().items():
        state[f"{_last_unused(model)}.{name}"] = torch.zeros_like(tensor)
    released.load_state_dict(state, assign=True)
    return released


def _rescaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """W_o (s·A + W_X X) = W_o·s/1.1 (1.1·A + W_X·1.1/s X), here with `factor` s/1.1; the same for W_o^c."""
    if factor == 1:
        return state
    factors = {".attn.to_out.0.weight": factor, ".attn.to_add_out.weight": factor}
    factors |= {f".attn.to_out_context.{name}": 1 / factor for name in ("weight", "bias")}

    def of(name: str) -> float:
        return next((value for end, value in factors.items() if name.endswith(end)), 1.0)

    return {name: tensor if of(name) == 1 else tensor * of(name) for name, tensor in state.items()}


def _released_name(name: str) -> str:
    """blocks.<i>.<projection>.… of VchitectLayers → the name in the released model."""
    _, block, rest = name.split(".", 2)
    return f"transformer_blocks.{block}.attn.{rest}"


def _last_unused(model: SerialSD3) -> str:
    return f"transformer_blocks.{len(model.temporal.blocks) - 1}.attn.{UNUSED}"


def _sd3_config(config: Any) -> dict[str, Any]:
    """The entries that SD3Transformer2DModel has too."""
    shared = _arguments(VchitectXLTransformerModel) & _arguments(SD3Transformer2DModel)
    return {name: config[name] for name in shared}


def _arguments(kind: type[Any]) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def _check_config(folder: Path) -> None:
    """
    Raises:
        MobiusError: the configuration has an entry that the conversion would lose.
    """
    path = folder / CONFIG
    config = read_json(path)
    known = _arguments(VchitectXLTransformerModel)
    problems = [f"{name} is unknown" for name in config if not name.startswith("_") and name not in known]
    factor = config.get("rope_scaling_factor", 1)
    if factor != 1:
        problems.append(f"rope_scaling_factor={factor}: frames here rotate by their own numbers")
    if problems:
        raise MobiusError(f"{path} is not the configuration of a released Vchitect-2.0: {'; '.join(problems)}")


def _report_parts(report: Report, model: SerialSD3, where: str) -> None:
    for part in model.parts:
        count = len(model.get_submodule(part).state_dict())
        what = "SD3" if part == model.image_part else "the branches"
        report.mapped.append((f"{count} tensors of {what}", where.format(part=part)))


def _check_written(report: Report, written: nn.Module, source: nn.Module) -> None:
    expected = weights_hash(source)
    report.require(weights_hash(written) == expected, f"the weights read back have the hash {expected[:12]}…")
