"""Named conditions: sizes of a clip, and what the empty caption replaces."""

from __future__ import annotations

import torch

from mobius_train.conditions import Conditions


def test_the_empty_caption_replaces_text_and_pooled_together_and_no_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = Conditions(
        {
            "text": torch.randn(3, 5, 4, generator=generator),
            "pooled": torch.randn(3, 2, generator=generator),
            "sizes": torch.arange(18).view(3, 6),
        }
    )
    empty = Conditions({"text": torch.zeros(5, 4), "pooled": torch.zeros(2)})
    mixed = batch.where(torch.tensor([True, False, True]), empty)
    assert [bool(mixed["text"][clip].any()) for clip in range(3)] == [True, False, True]
    assert [bool(mixed["pooled"][clip].any()) for clip in range(3)] == [True, False, True]
    assert torch.equal(mixed["text"][2], batch["text"][2])
    assert torch.equal(mixed["sizes"], batch["sizes"])


def test_a_clip_of_a_size_has_the_sizes_that_diffusers_samples_with() -> None:
    assert Conditions.of_size(336, 448, {"text"}).tensors == {}
    sizes = Conditions.of_size(1023, 448, {"text", "sizes"})
    assert sizes["sizes"].tolist() == [1023, 448, 0, 0, 1023, 448]
    # bfloat16 has no 1023.
    assert sizes.to(dtype=torch.bfloat16)["sizes"].tolist() == [1023, 448, 0, 0, 1023, 448]
    clips = (Conditions.of_text(torch.ones(5, 4)) | sizes).unsqueeze().repeat_frames(2)
    assert {name: tuple(tensor.shape) for name, tensor in clips.tensors.items()} == {"text": (2, 5, 4), "sizes": (2, 6)}
