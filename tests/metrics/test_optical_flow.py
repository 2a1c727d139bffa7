import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mobius_train.metrics.optical_flow import dis_flow, fastest_speed, middle_frame


def _texture() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 1.5), np.uint8)


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_a_translation_is_measured_in_pixels(shift: int) -> None:
    flow = dis_flow(_texture(), np.roll(_texture(), shift, axis=1))
    right, down = np.median(flow[16:-16, 16:-16], axis=(0, 1))
    assert right == pytest.approx(shift, abs=0.05)
    assert down == pytest.approx(0, abs=0.05)


def test_the_fastest_twentieth_is_averaged() -> None:
    flow = np.zeros((10, 10, 2), np.float32)
    flow[0, :5] = (3, 4)
    assert fastest_speed(flow) == pytest.approx(5)
    flow[0, 4] = 0
    assert fastest_speed(flow) == pytest.approx(4)


def test_the_middle_of_a_translation_is_half_the_way() -> None:
    first = _texture()
    middle = middle_frame(first, np.roll(first, 4, axis=1))[16:-16, 16:-16]
    errors = [np.abs(middle - np.roll(first, shift, axis=1)[16:-16, 16:-16]).mean() for shift in (0, 2, 4)]
    assert errors[1] < 0.5
    assert min(errors[0], errors[2]) > 5
