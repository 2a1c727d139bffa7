"""The text of PixArt: what diffusers' pipelines encode, to the last bit, and its mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_sd import T5, save_pixart

from mobius_train.encoders.load_text_encoding import load_text_encoding

CPU = torch.device("cpu")
WANTED = {"text": T5, "mask": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {sigma: save_pixart(folder / str(sigma), sigma) for sigma in (False, True)}


@torch.no_grad()
@pytest.mark.parametrize("sigma", [False, True], ids=["alpha", "sigma"])
@pytest.mark.parametrize("tokens", [None, 12])
def test_text_and_mask_are_those_of_diffusers(folders: dict[bool, Path], sigma: bool, tokens: int | None) -> None:
    text = load_text_encoding(str(folders[sigma]), CPU, tokens, WANTED)
    pipeline = DiffusionPipeline.from_pretrained(folders[sigma])
    length = {"max_sequence_length": tokens} if tokens else {}
    expected = tokens or (300 if sigma else 120)
    assert text.shapes() == {"text": (expected, T5), "mask": (expected,)}
    for prompt in ("a dog", " A red Dog and a hen and a bear"):
        positive, mask, negative, negative_mask = pipeline.encode_prompt(prompt, **length)
        for caption, states, own in ((prompt, positive, mask), ("", negative, negative_mask)):
            found = text.encode(caption)
            assert torch.equal(found["text"], states[0])
            assert torch.equal(found["mask"], own[0].bool())
        assert not torch.equal(text.encode(f"bear {prompt}")["text"], positive[0])
    assert 0 < int(text.encode("a dog")["mask"].sum()) < expected


def test_only_a_backbone_that_takes_a_mask_gets_one(folders: dict[bool, Path]) -> None:
    plain, masked = (load_text_encoding(str(folders[True]), CPU, 12, names) for names in ({"text": T5}, WANTED))
    assert set(plain.encode("a dog").tensors) == {"text"}
    assert torch.equal(plain.encode("a dog")["text"], masked.encode("A DOG")["text"])
    assert not torch.equal(plain.encode("A DOG")["text"], masked.encode("A DOG")["text"])
    assert plain.identity() != masked.identity()
