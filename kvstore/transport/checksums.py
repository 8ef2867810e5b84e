"""Checksums of whole pages, as `--verify-kv` compares them: crc32 of a page's bytes, wherever the page lies.

Made where a page is read and compared where it has arrived. A crc32 finds every error of up to 32 bits in a row and misses
another one in 4 * 10^9; it is no protection against somebody who means harm.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import PeerFailed
from kvstore.transport.layer_events import Marks
from kvstore.transport.own_pages import HostPages, OwnPages
from kvstore.transport.page_sums import page_sums
from kvstore.transport.pages import Ids, as_ids

Checksums = tuple[int, ...]
"""crc32 of pages, in their order."""
Expected = NDArray[np.int64]
"""Checksums that are known; UNKNOWN where none is."""

UNKNOWN = -1


def checksums_of(own: OwnPages, pages: Ids) -> Checksums:
    """Of this process's pages. Those of a device are read out to the host first. Raises PeerFailed for pages that are not there.

    All work that writes them has ended: nothing is waited for.
    """
    ids = as_ids(pages)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < own.n_pages:
        raise PeerFailed(f"pages {int(ids.min())} to {int(ids.max())} were to be checked; there are {own.n_pages}")
    if isinstance(own, HostPages):
        rows = own.rows
        return tuple(zlib.crc32(rows[page]) for page in ids.tolist())
    return page_sums(own.read(ids.tolist(), Marks()), own.layout.page_bytes)


def wrong_places(expected: Expected | Sequence[int], found: Checksums) -> list[int]:
    """Where a checksum is known and another one was found."""
    return [
        place
        for place, (known, made) in enumerate(zip(expected, found, strict=True))
        if known != made and known != UNKNOWN
    ]


def in_rows(checksums: Checksums, width: int) -> tuple[Checksums, ...]:
    """Block by block, as messages carry them: [block][layer] with `width` layers."""
    return tuple(checksums[low : low + width] for low in range(0, len(checksums), width))
