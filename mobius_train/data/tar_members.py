"""The members of an uncompressed tar, with the checks that `tarfile` leaves out.

`tarfile` takes a damaged header or zeros for the end of the archive, and reads headers of any size into memory. Only
headers are read here; nothing is unpacked.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mobius_train.data.rank_zero import warn_on_rank_zero

logger = logging.getLogger(__name__)

END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
MAX_HEADER = 2**20  # bytes of one extended header: long names and attributes
PART = 2**20


class DamagedTar(Exception):
    """A tar that is truncated, damaged, or followed by other data; the text says where."""


class _Headers(io.BufferedReader):
    """A file that refuses to read large headers."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes; the limit is {MAX_HEADER}")
        return super().read(size)


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar. A member may extend beyond the end of the file: compare with `offset_data`.

    Raises:
        DamagedTar: after the last legible member, if the archive does not end there with two blocks of zeros, or other
            data follow them.
        OSError: the file cannot be read.
    """
    end, count = 0, 0
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset < end:
                    raise DamagedTar(f"damaged at byte {end}")
                end = member.offset_data
                count += 1
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DamagedTar(f"not a complete, uncompressed tar: {error}") from error
    except RecursionError as error:
        raise DamagedTar("damaged: too many extended headers in a row") from error
    zeros = _check_end(path, end)
    # tar fills its last record.
    if zeros >= len(END_OF_ARCHIVE) + tarfile.RECORDSIZE:
        warn_on_rank_zero(
            logger, f"{path} has {count} members and then {zeros} bytes of zeros: its end may have been lost"
        )


def _check_end(path: Path, end: int) -> int:
    """The number of zeros after the last member, up to the file's end."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
            raise DamagedTar(f"truncated or damaged at byte {end}")
        while part := file.read(PART):
            if part.count(0) != len(part):
                at = file.tell() - len(part.lstrip(b"\0"))
                raise DamagedTar(f"it ends at byte {end}, but other data follow at byte {at}")
        return file.tell() - end
