from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import save_vae
from tiny_encoders import save_clip, save_video_encoder

from mobius_train.errors import MobiusError
from mobius_train.evaluate.frechet import controls, frechet_distance
from mobius_train.evaluate.set_features import PooledLatents, VideoEncoder

CPU = torch.device("cpu")


def normal(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "width"), [(50, 6), (5, 20)])
def test_the_distance_is_that_of_the_matrix_square_root(count: int, width: int) -> None:
    """Also with fewer clips than features, where the covariances are singular."""
    first, second = normal(count, width, 0) * 2 + 1, normal(count + 3, width, 1) @ normal(width, width, 2)
    covariances = [features.T.cov() for features in (first, second)]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)


def test_known_distances() -> None:
    features = normal(100, 4, 0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 3) == pytest.approx(4 * 9)
    # Equal means: tr(Σ + 4 Σ - 2·2 Σ) = tr Σ.
    centred = features - features.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(float(centred.T.cov().trace()))


def test_controls_tell_features_that_see_the_order_from_those_that_do_not() -> None:
    real = normal(200, 4, 0)
    seeing = controls(real, real + 1)
    assert seeing.shuffled > 10 * seeing.halves
    blind = controls(real, real)
    assert blind.shuffled == blind.halves


def test_latents_are_pooled_to_means_and_changes(tmp_path: Path) -> None:
    save_vae(tmp_path)
    features = PooledLatents.load(tmp_path, CPU)
    frames = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    vae = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        latents = vae.encode(frames.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    expected = torch.cat([latents.mean((0, 2, 3)), (latents[1:] - latents[:-1]).abs().mean((0, 2, 3))])
    torch.testing.assert_close(features.of(frames).float(), expected, rtol=1e-4, atol=1e-5)
    still = features.of(frames[:1].expand(4, -1, -1, -1))
    assert still[4:].abs().max() < 1e-6
    with pytest.raises(MobiusError, match=r"no model folder .*missing"):
        PooledLatents.load(tmp_path / "missing", CPU)


def test_a_video_encoder_gives_its_name_and_sees_the_frames(tmp_path: Path) -> None:
    features = VideoEncoder(save_video_encoder(tmp_path / "videomae"), CPU)
    assert features.name == "frechet_videomae"
    frames = torch.randint(0, 256, (8, 3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert features.of(frames).shape == (16,)
    assert not torch.allclose(features.of(frames), features.of(frames.flip(0)))
    # Frames 0, 2, 4 and 6 of 8 are taken.
    assert torch.equal(features.of(frames), features.of(frames[::2]))
    features.check(4, "clips")
    with pytest.raises(MobiusError, match="4 frames"):
        features.check(3, "clips")


def test_other_models_are_no_video_encoder(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match="videomae"):
        VideoEncoder(save_clip(tmp_path / "clip"), CPU)
