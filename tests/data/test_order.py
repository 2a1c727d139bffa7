"""The order of samples: complete, the same for any number of ranks, and resumable."""

from itertools import islice

import pytest
import torch

from mobius_train.data.order import GlobalBatches, clip_of, frame_of, permutation


def test_every_epoch_holds_every_clip_once_and_epochs_differ() -> None:
    epochs = [[clip_of(epoch * 10 + i, 10, seed=3) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [clip_of(i, 10, seed=4) for i in range(10)] != epochs[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(ranks: int) -> None:
    size = 8 // ranks
    streams = [islice(GlobalBatches(size, rank, ranks), 5) for rank in range(ranks)]
    steps = [[sample for part in parts for sample in part] for parts in zip(*streams, strict=True)]
    assert steps == [list(range(i * 8, i * 8 + 8)) for i in range(5)]


def test_a_stream_continues_after_the_samples_seen() -> None:
    whole = list(islice(GlobalBatches(2, 1, 2), 6))
    assert list(islice(GlobalBatches(2, 1, 2, samples_seen=12), 3)) == whole[3:]


def test_frames_are_drawn_evenly() -> None:
    counts = [0] * 4
    for i in range(2000):
        counts[frame_of(i, 4, seed=0)] += 1
    assert min(counts) > 420


def test_the_order_is_that_of_older_versions() -> None:
    # Checkpoints count samples of this order: a resumed run has to find the same one.
    assert [clip_of(i, 6, seed=3) for i in range(18)] == [2, 5, 4, 0, 3, 1, 3, 1, 5, 2, 4, 0, 0, 4, 5, 2, 1, 3]
    for count in (1, 1000, 70_001):
        generator = torch.Generator().manual_seed(11)
        assert torch.equal(permutation(count, 11), torch.randperm(count, generator=generator).int())
