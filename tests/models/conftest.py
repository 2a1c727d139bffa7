from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from kinds import quick_first
from unets import CONFIGS, tiny_unet


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on a busy machine waiting for them costs minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=quick_first(CONFIGS, "emoji", "sd2"))
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """One small 2D UNet of each kind, in turn."""
    return tiny_unet(request.param)
