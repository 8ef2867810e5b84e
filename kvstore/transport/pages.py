"""Copying whole pages between two arrays of pages: few calls, each without the interpreter's lock."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]
"""[page, page_bytes], contiguous."""

_BATCH_BYTES = 64 * 1024  # stays in a near cache, below the size for which malloc maps fresh memory
_LONG_RUN_PAGES = 4  # runs of this length, on average, are copied one by one


def copy_pages(source: Rows, source_pages: Sequence[int], target: Rows, target_pages: Sequence[int]) -> None:
    """target[target_pages[i]] = source[source_pages[i]] for every i. Raises IndexError before anything is copied.

    Neighbours on both sides are copied as one piece; scattered pages by gather and scatter in batches.
    """
    count = len(source_pages)
    if count != len(target_pages):
        raise IndexError(f"{count} source pages for {len(target_pages)} target pages")
    if count == 0:
        return
    first, place = run_start(source_pages), run_start(target_pages)
    if first is not None and place is not None:
        _require_inside("source", first, first + count - 1, source)
        _require_inside("target", place, place + count - 1, target)
        target[place : place + count] = source[first : first + count]
    else:
        _require_inside("source", min(source_pages), max(source_pages), source)
        _require_inside("target", min(target_pages), max(target_pages), target)
        runs = _runs(source_pages, target_pages)
        if len(runs) * _LONG_RUN_PAGES > count:
            _scatter(source, np.array(source_pages, np.int64), target, np.array(target_pages, np.int64))
            return
        for first, place, n_pages in runs:
            target[place : place + n_pages] = source[first : first + n_pages]


def run_start(pages: Sequence[int]) -> int | None:
    """The first of consecutive rising pages; None if they are not, or are none. Cheap: most spans are runs."""
    if not pages:
        return None
    first = pages[0]
    run = range(first, first + len(pages))
    return first if pages == run or (pages[-1] == run[-1] and tuple(pages) == tuple(run)) else None


def _runs(source_pages: Sequence[int], target_pages: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first source page, first target page, pages) of stretches that are neighbours on both sides."""
    runs: list[tuple[int, int, int]] = []
    first, place, n_pages = source_pages[0], target_pages[0], 0
    for source_page, target_page in zip(source_pages, target_pages, strict=True):
        if source_page != first + n_pages or target_page != place + n_pages:
            runs.append((first, place, n_pages))
            first, place, n_pages = source_page, target_page, 0
        n_pages += 1
    runs.append((first, place, n_pages))
    return runs


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


def _require_inside(side: str, lowest: int, highest: int, rows: Rows) -> None:
    if lowest < 0 or highest >= len(rows):
        raise IndexError(f"{side} pages {lowest} to {highest} of {len(rows)}")
