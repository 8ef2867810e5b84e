"""Copying whole pages between two arrays of pages: few calls, each without the interpreter's lock."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]
"""[page, page_bytes], contiguous."""

PageIds = Sequence[int] | NDArray[np.int64]

_BATCH_BYTES = 384 * 1024  # gathered pages stay in the second-level cache until they are scattered
_FEW_RUNS = 4  # runs at least this many pages long on average are copied one by one


def copy_pages(source: Rows, source_pages: PageIds, target: Rows, target_pages: PageIds) -> None:
    """target[target_pages[i]] = source[source_pages[i]] for every i. Raises IndexError before anything is copied.

    Neighbours on both sides are copied as one piece; scattered pages by gather and scatter in batches.
    """
    sources, targets = np.asarray(source_pages, np.int64), np.asarray(target_pages, np.int64)
    if len(sources) != len(targets):
        raise IndexError(f"{len(sources)} source pages for {len(targets)} target pages")
    if len(sources) == 0:
        return
    _require_inside("source", sources, source)
    _require_inside("target", targets, target)
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    if len(sources) < _FEW_RUNS * (len(breaks) + 1) and len(sources) >= _FEW_RUNS:
        _scatter(source, sources, target, targets)
        return
    edges = [0, *breaks.tolist(), len(sources)]
    for low, high in itertools.pairwise(edges):
        first, place, count = int(sources[low]), int(targets[low]), high - low
        target[place : place + count] = source[first : first + count]


def gather(source: Rows, source_pages: Sequence[int]) -> bytearray:
    """The pages one after the other. Raises IndexError."""
    joined = bytearray(len(source_pages) * source.shape[1])
    copy_pages(source, source_pages, rows_of(joined, source.shape[1]), range(len(source_pages)))
    return joined


def rows_of(buffer: bytearray | bytes | memoryview, page_bytes: int) -> Rows:
    """A buffer as pages, no copy. Raises ValueError if it does not hold whole pages."""
    return np.frombuffer(buffer, np.uint8).reshape(-1, page_bytes)


def _scatter(source: Rows, sources: NDArray[np.int64], target: Rows, targets: NDArray[np.int64]) -> None:
    page_bytes = source.shape[1]
    whole = np.dtype((np.void, page_bytes))  # one element per page: numpy then moves it with one memcpy
    from_pages, to_pages = source.view(whole)[:, 0], target.view(whole)[:, 0]
    batch_pages = max(1, _BATCH_BYTES // page_bytes)
    for low in range(0, len(sources), batch_pages):
        high = low + batch_pages
        to_pages[targets[low:high]] = from_pages[sources[low:high]]


def _require_inside(side: str, pages: NDArray[np.int64], rows: Rows) -> None:
    lowest, highest = int(pages.min()), int(pages.max())
    if lowest < 0 or highest >= len(rows):
        raise IndexError(f"{side} pages {lowest} to {highest} of {len(rows)}")
