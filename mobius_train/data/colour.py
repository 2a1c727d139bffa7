"""Conversion of high dynamic range and wide gamut to sRGB.

Legend: codes are R'G'B' values from 0 to 1; light is linear, 1 is the reference white of 203 cd/m2 (ITU-R BT.2408).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Numbers of ITU-T H.273.
PQ, HLG = 16, 18
WHITE = 203.0  # cd/m2
PEAK = 1000.0  # cd/m2, of the display for which the content is assumed to be mastered
DEPTH = 65536
_BT2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]  # ITU-R BT.2087
_P3 = [[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]]
TO_BT709 = {9: np.array(_BT2020, np.float32), 12: np.array(_P3, np.float32)}
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


# Further numbers of ITU-T H.273 whose colours are visibly other than sRGB's: gamma 2.8, linear, logarithms, SMPTE 428;
# primaries of BT.470 M, film, XYZ, DCI-P3 and EBU 3213.
OTHER_TRANSFERS, OTHER_PRIMARIES = (5, 8, 9, 10, 17), (4, 8, 10, 11, 22)


def colour_notes(transfer: int, primaries: int) -> list[str]:
    """What is unusual about colours, and how they are shown."""
    notes = []
    if needs_conversion(transfer, primaries):
        notes.append("HDR or wide gamut: converted to sRGB")
    if transfer in OTHER_TRANSFERS:
        notes.append(f"transfer characteristics {transfer} of ITU-T H.273: shown as those of sRGB")
    if primaries in OTHER_PRIMARIES:
        notes.append(f"colour primaries {primaries} of ITU-T H.273: shown as those of sRGB")
    return notes


def needs_conversion(transfer: int, primaries: int) -> bool:
    """True if the codes are not shown correctly as sRGB."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def to_srgb(codes: NDArray[np.uint16], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """Convert (H, W, 3) full-range codes of 16 bits to sRGB of 8 bits.

    Light above the reference white is compressed by the curve of ITU-R BT.2390 on the largest of the three channels,
    which keeps the hue.

    Args:
        transfer, primaries: numbers of ITU-T H.273.
    """
    light = _light(transfer)[codes]
    if transfer == HLG:  # the display's gamma of 1.2, ITU-R BT.2100
        light *= (light @ LUMA_2020)[..., None] ** 0.2 * (PEAK / WHITE)
    if transfer in (PQ, HLG):
        brightest = light.max(axis=-1, keepdims=True)
        light *= _tone(brightest) / np.maximum(brightest, 1e-6)
    if primaries in TO_BT709:
        light = light @ TO_BT709[primaries].T
    return _srgb_codes()[(light.clip(0, 1) * (DEPTH - 1) + 0.5).astype(np.uint16)]


@cache
def _light(transfer: int) -> Floats:
    """Light of each code; for HLG that of the scene."""
    codes = np.arange(DEPTH) / (DEPTH - 1)
    if transfer == PQ:
        light = _pq_light(codes) / WHITE
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
    else:
        light = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb_codes() -> NDArray[np.uint8]:
    light = np.arange(DEPTH) / (DEPTH - 1)
    codes = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (codes * 255 + 0.5).astype(np.uint8)


def _tone(light: Floats) -> Floats:
    """ITU-R BT.2390, 5.4.1: identity in the shadows, then a spline that brings PEAK to WHITE."""
    codes, tones = _tone_curve()
    return np.interp(_pq_code(light.astype(np.float64) * WHITE), codes, tones).astype(np.float32)


@cache
def _tone_curve() -> tuple[Any, Any]:
    """PQ codes of the source, and the light that they become."""
    source, target = _pq_code(np.array([PEAK, WHITE]))
    e1 = np.linspace(0, 1, 1025)
    most = target / source
    knee = 1.5 * most - 0.5
    t = (e1 - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return e1 * source, _pq_light(np.where(e1 < knee, e1, spline) * source) / WHITE


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _pq_light(codes: Any) -> Any:
    """SMPTE ST 2084: cd/m2 of each code."""
    power = codes ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _pq_code(nits: Any) -> Any:
    power = (np.maximum(nits, 0) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
