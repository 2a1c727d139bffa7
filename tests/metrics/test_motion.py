from itertools import combinations, permutations

import pytest
import torch

from mobius_train.metrics.motion import frame_difference, frame_order, motion, motion_correlation


def clip_of(*levels: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 6), level, dtype=torch.uint8) for level in levels])


def test_the_difference_is_in_grey_levels() -> None:
    assert frame_difference(clip_of(10, 14, 8)) == pytest.approx((4 + 6) / 2)


def test_falling_levels_do_not_wrap_around() -> None:
    assert frame_difference(clip_of(255, 0)) == 255


def test_a_still_clip_has_none() -> None:
    assert frame_difference(clip_of(7, 7, 7)) == 0


def test_every_clip_counts_the_same() -> None:
    assert motion([clip_of(0, 2), clip_of(0, 4, 0, 4)])["frame_difference"] == pytest.approx(3)


def test_motion_adds_up_over_half_a_clip_and_flicker_does_not() -> None:
    assert motion([clip_of(0, 1, 2, 3, 4, 5, 6, 7)]) == {
        "frame_difference": 1,
        "half_clip_difference": 4,
        "neighbour_ratio": 0.25,
    }
    assert motion([clip_of(0, 5, 5, 0, 5, 0, 0, 5)])["half_clip_difference"] == 5


@pytest.mark.parametrize("frames", [clip_of(1), clip_of(1, 2).float(), clip_of(1, 2)[0]])
def test_what_is_no_clip_is_refused(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"frame_difference.*uint8"):
        frame_difference(frames)


def test_no_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="clip"):
        motion([])


def test_the_order_is_the_neighbours_share_of_all_pairs() -> None:
    clip = torch.randint(0, 256, (4, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    squares = {(f, g): (clip[f].float() - clip[g].float()).square().mean() for f, g in combinations(range(4), 2)}
    neighbours = torch.stack([squares[f, f + 1] for f in range(3)]).mean()
    assert frame_order(clip) == pytest.approx(float(neighbours / torch.stack(list(squares.values())).mean()))


def test_steady_motion_has_order_and_the_mean_over_all_orders_has_none() -> None:
    clip = clip_of(0, 10, 20, 30)
    orders = [frame_order(clip[list(order)]) or 0.0 for order in permutations(range(4))]
    assert frame_order(clip) == min(orders) == pytest.approx(100 / ((3 * 100 + 2 * 400 + 900) / 6))
    assert sum(orders) / len(orders) == pytest.approx(1)


def test_a_still_clip_has_no_order() -> None:
    assert frame_order(clip_of(7, 7, 7)) is None
    with pytest.raises(ValueError, match="frame_order"):
        frame_order(clip_of(7))


def test_a_clip_correlates_with_itself_whatever_its_contrast() -> None:
    clip = clip_of(0, 10, 30, 20)
    assert motion_correlation(clip, clip) == pytest.approx(1)
    assert motion_correlation(clip, clip * 2 + 7) == pytest.approx(1)
    assert motion_correlation(clip, clip_of(30, 20, 0, 10)) == pytest.approx(-1)


def test_random_flicker_does_not_correlate() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(2))
    assert abs(motion_correlation(first, second)) < 0.02


def test_a_still_has_no_motion_to_correlate() -> None:
    assert motion_correlation(clip_of(7, 7), clip_of(0, 9)) == 0


def test_clips_of_different_shapes_do_not_compare() -> None:
    with pytest.raises(ValueError, match="shape"):
        motion_correlation(clip_of(1, 2), clip_of(1, 2, 3))
