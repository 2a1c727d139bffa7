from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet3DConditionModel
from tiny_sd import save_sd3, save_sdxl
from unets import tiny_unet
from video_models import save_modelscope, serial, unet3d

from mobius_train.convert import compare
from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.serial_parallel import parallel_to_serial, serial_to_parallel
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, SerialUNet, weights_hash
from mobius_train.pipeline import load_pipeline
from mobius_train.ring_shape import RingShape

pytestmark = pytest.mark.slow


def test_weights_go_to_a_ring_and_back_hash_for_hash(tmp_path: Path) -> None:
    original = unet3d()
    original.save_pretrained(tmp_path / "serial")
    report = serial_to_parallel(tmp_path / "serial", tmp_path / "parallel")
    assert report.left_out == []
    assert "predictions are not" in report.notes[-1]
    parallel = ParallelUNet.from_pretrained(tmp_path / "parallel")
    state = original.state_dict()
    temporal = SerialUNet.from_unet3d(original).temporal.state_dict()
    assert all(torch.equal(parallel.ring.state_dict()[name], tensor) for name, tensor in temporal.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in parallel.spatial.state_dict().items())

    back = parallel_to_serial(tmp_path / "parallel", tmp_path / "back")
    assert weights_hash(UNet3DConditionModel.from_pretrained(tmp_path / "back")) == weights_hash(original)
    assert any(what.endswith("fusion") for what, _ in back.left_out)


def test_a_trained_ring_takes_its_weights_along(tmp_path: Path) -> None:
    unet3d().save_pretrained(tmp_path / "serial")
    serial_to_parallel(tmp_path / "serial", tmp_path / "parallel")
    parallel = ParallelUNet.from_pretrained(tmp_path / "parallel")
    with torch.no_grad():
        parallel.ring.get_parameter("mid_block.temp_convs.0.conv1.2.weight").add_(1)
        # Without a say of the ring, any other topology would go unseen.
        parallel.ring.fusion.weight += 0.1
    parallel.save_pretrained(tmp_path / "trained")
    parallel_to_serial(tmp_path / "trained", tmp_path / "back")
    back, before = UNet3DConditionModel.from_pretrained(tmp_path / "back").state_dict(), unet3d().state_dict()
    changed = {name for name in before if not torch.equal(back[name], before[name])}
    assert changed == {"mid_block.temp_convs.0.conv1.2.weight"}
    apart = compare.distance(compare.prediction(unet3d()), compare.prediction(parallel))
    assert apart > 0.01


def test_convolutions_as_projections_become_linear_ones(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    config = UNet2DConditionModel.load_config(stable_diffusion["small"] / "unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config, use_linear_projection=False)
    assert unet.state_dict()["mid_block.attentions.0.proj_in.weight"].ndim == 4
    ParallelUNet.from_unet2d(unet).save_pretrained(tmp_path / "parallel")
    report = parallel_to_serial(tmp_path / "parallel", tmp_path / "serial")
    assert any("2D layers predict" in check for check in report.checks)
    back = serial_to_parallel(tmp_path / "serial", tmp_path / "again")
    assert not back.problems
    written = ParallelUNet.from_pretrained(tmp_path / "again").spatial
    assert written.state_dict()["mid_block.attentions.0.proj_in.weight"].ndim == 2
    assert compare.distance(compare.prediction(written), compare.prediction(unet)) < 1e-5


def test_a_ring_of_another_width_is_refused_by_name(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion["sd21"] / "unet")
    ParallelUNet.from_unet2d(unet, 0.5).save_pretrained(tmp_path / "half")
    with pytest.raises(MobiusError, match=r"ring_width=0\.5"):
        parallel_to_serial(tmp_path / "half", tmp_path / "serial")
    assert not (tmp_path / "serial").exists()


def test_a_narrow_deep_ring_takes_what_fits_and_the_rest_is_reported(
    stable_diffusion: dict[str, Path], tmp_path: Path
) -> None:
    model = serial(stable_diffusion["sd21"])
    model.save_pretrained(tmp_path / "serial")
    shape = RingShape(0.5, 2, tail_temporal_layers=True, trained_tail=True)
    report = serial_to_parallel(tmp_path / "serial", tmp_path / "parallel", shape=shape)
    parallel = ParallelUNet.from_pretrained(tmp_path / "parallel")
    assert parallel.ring_shape == shape
    ring, temporal = parallel.ring.state_dict(), model.temporal.state_dict()
    carried = {name for name in temporal if name.startswith(("up_blocks.2.", "up_blocks.3."))}
    assert all(torch.equal(ring[name], temporal[name]) for name in carried)
    assert report.mapped[0] == (f"{len(carried)} temporal tensors", "ring")
    lost = sum(int(what.split()[0]) for what, _ in report.left_out)
    assert lost == len(temporal) - len(carried) > 0
    made = sum(int(what.split()[0]) for what, _ in report.made)
    assert made == len(ring) - len(carried)
    with pytest.raises(MobiusError, match="fusion_depth=2"):
        parallel_to_serial(tmp_path / "parallel", tmp_path / "back")


def test_pipelines_keep_their_other_parts(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    source = save_modelscope(stable_diffusion["small"], tmp_path / "modelscope")
    serial_to_parallel(source, tmp_path / "parallel")
    ours = load_pipeline(tmp_path / "parallel", "cpu")
    assert ours("dog", num_frames=2, num_inference_steps=2, output_type="pt").frames.shape == (1, 2, 3, 32, 32)
    parallel_to_serial(tmp_path / "parallel", tmp_path / "back")
    before = DiffusionPipeline.from_pretrained(source)
    after = DiffusionPipeline.from_pretrained(tmp_path / "back")
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(after, part)) == weights_hash(getattr(before, part))
    assert after.scheduler.config.prediction_type == before.scheduler.config.prediction_type


def test_our_serial_model_goes_too(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    model = serial(stable_diffusion["sd15"])
    model.save_pretrained(tmp_path / "serial")
    serial_to_parallel(tmp_path / "serial", tmp_path / "parallel")
    ring = ParallelUNet.from_pretrained(tmp_path / "parallel").ring.state_dict()
    assert all(torch.equal(ring[name], tensor) for name, tensor in model.temporal.state_dict().items())
    # Its heads are of two sizes, which the class of diffusers cannot have.
    with pytest.raises(MobiusError, match=r"heads.*\b64\b"):
        parallel_to_serial(tmp_path / "parallel", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_stable_diffusion_xl_is_refused_by_name(tmp_path: Path) -> None:
    ParallelUNet.from_unet2d(tiny_unet("sdxl")).save_pretrained(tmp_path / "parallel")
    with pytest.raises(MobiusError, match=r"(?s)transformer_layers_per_block.*addition_embed_type='text_time'"):
        parallel_to_serial(tmp_path / "parallel", tmp_path / "serial")
    assert not (tmp_path / "serial").exists()


def test_a_serial_model_of_xl_becomes_a_ring_with_both_text_encoders(tmp_path: Path) -> None:
    from_image_model(save_sdxl(tmp_path / "xl"), tmp_path / "serial", "serial")
    report = serial_to_parallel(tmp_path / "serial", tmp_path / "parallel")
    assert not report.problems
    assert not any("temporal" in what for what, _ in report.left_out)
    made, source = (load_pipeline(tmp_path / name, "cpu") for name in ("parallel", "serial"))
    assert isinstance(made.unet, ParallelUNet)
    assert made.text_encoder_2 is not None
    ring = made.unet.ring.state_dict()
    assert all(torch.equal(ring[name], tensor) for name, tensor in source.unet.temporal.state_dict().items())
    # diffusers' class has neither pooled text nor sizes.
    with pytest.raises(MobiusError, match="addition_embed_type='text_time'"):
        parallel_to_serial(tmp_path / "parallel", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_transformers_are_refused_by_name(tmp_path: Path) -> None:
    source = save_sd3(tmp_path / "sd3")
    cases: tuple[tuple[Any, Any, str], ...] = (
        ("serial", serial_to_parallel, "SerialSD3.*UNet3DConditionModel or a SerialUNet"),
        ("parallel", parallel_to_serial, "ParallelSD3, not a ParallelUNet"),
    )
    for mode, convert, named in cases:
        from_image_model(source, tmp_path / mode, mode)
        with pytest.raises(MobiusError, match=named):
            convert(tmp_path / mode, tmp_path / "out")
        assert not (tmp_path / "out").exists()
