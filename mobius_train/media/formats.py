"""The formats of a clip's files, and the frame rates that players show."""

from __future__ import annotations

from mobius_train.errors import MobiusError

FORMATS = ("gif", "mp4", "png")
# Frames per second. A GIF counts the time of equal frames in hundredths of a second, up to 65535.
SLOWEST, FASTEST = 0.1, 50


def check_fps(fps: float) -> None:
    """
    Raises:
        MobiusError: players do not support the fps.
    """
    if not SLOWEST <= fps <= FASTEST:
        raise MobiusError(
            f"fps={fps:g} must be between {SLOWEST:g} and {FASTEST:g}, the limits of GIF files and players"
        )
