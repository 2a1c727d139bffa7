from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import save_clips, save_pipeline

# Nothing here may reach for a model hub, and models this small gain nothing from threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of the emoji layout: unet/, vae/, scheduler/."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten GIFs of 4 frames, 32 px, with captions."""
    return save_clips(tmp_path_factory.mktemp("clips"))
