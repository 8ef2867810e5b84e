"""Copying whole pages between two arrays of pages: few calls, each without the interpreter's lock.

Pages of one layer of neighbouring blocks lie at one distance from each other, pages of whole neighbouring blocks lie
side by side. Both are one call, and both are recognised by comparing with a range.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]
"""[page, page_bytes], contiguous."""
Ids = Sequence[int] | NDArray[np.integer]
"""Page numbers, of one dimension."""

Steps = tuple[NDArray[np.int64], NDArray[np.int64]]
"""From each page to the next, on both sides."""

_BATCH_BYTES = 64 * 1024  # stays in a near cache, below the size for which malloc maps fresh memory
_LONG_STRETCH_PAGES = 4  # stretches of this length, on average, are copied one by one


def copy_pages(source: Rows, source_pages: Ids, target: Rows, target_pages: Ids) -> int:
    """target[target_pages[i]] = source[source_pages[i]] for every i; returns how many contiguous pieces those were.

    Raises IndexError before anything is copied. Neighbours on both sides, or pages at one distance, are copied by one
    call each; scattered pages by gather and scatter in batches.
    """
    count = len(source_pages)
    if count != len(target_pages):
        raise IndexError(f"{count} source pages for {len(target_pages)} target pages")
    if count == 0:
        return 0
    sources, targets = as_range(source_pages), as_range(target_pages)
    if sources is not None and targets is not None:
        _require_inside("source", sources[0], sources[-1], source)
        _require_inside("target", targets[0], targets[-1], target)
        target[targets.start : targets.stop : targets.step] = source[sources.start : sources.stop : sources.step]
        return 1 if sources.step == targets.step == 1 else count
    from_ids, to_ids = as_ids(source_pages), as_ids(target_pages)
    _require_inside("source", int(from_ids.min()), int(from_ids.max()), source)
    _require_inside("target", int(to_ids.min()), int(to_ids.max()), target)
    steps = np.diff(from_ids), np.diff(to_ids)
    width = _width(steps)
    froms, tos = _as_grid(source, from_ids, width), _as_grid(target, to_ids, width)
    if froms is not None and tos is not None:
        tos[:] = froms
        return len(froms)
    _copy_stretches(source, from_ids, target, to_ids, steps)
    return _pieces(steps)


def _width(steps: Steps) -> int:
    """Length of the first stretch of neighbours on both sides."""
    apart = np.flatnonzero((steps[0] != 1) | (steps[1] != 1))
    return int(apart[0]) + 1 if apart.size else steps[0].size + 1


def _as_grid(rows: Rows, ids: NDArray[np.int64], width: int) -> Rows | None:
    """Stretches of `width` neighbours at one distance (some layers of neighbouring blocks) as one view, a row for each."""
    if width < _LONG_STRETCH_PAGES or ids.size % width or ids.size == width:
        return None
    grid = ids.reshape(-1, width)
    step = int(grid[1, 0] - grid[0, 0])
    if step < width or (np.diff(grid[:, 0]) != step).any() or (np.diff(grid, axis=1) != 1).any():
        return None
    page_bytes = rows.shape[1]
    shape, strides = (len(grid), width * page_bytes), (step * page_bytes, 1)
    return np.lib.stride_tricks.as_strided(rows[int(ids[0]) :], shape, strides)


def count_pieces(source_pages: Ids, target_pages: Ids) -> int:
    """Contiguous pieces of a copy: maximal stretches that are rising neighbours on both sides."""
    return _pieces((np.diff(as_ids(source_pages)), np.diff(as_ids(target_pages)))) if len(source_pages) else 0


def _pieces(steps: Steps) -> int:
    return 1 + int(steps[0].size - np.count_nonzero((steps[0] == 1) & (steps[1] == 1)))


def as_range(pages: Ids) -> range | None:
    """The pages as a rising range; None if they are none or not at one distance. Cheap: most spans are."""
    if isinstance(pages, range):
        return pages if len(pages) and pages.step > 0 else None
    if len(pages) == 0:
        return None
    first, last = int(pages[0]), int(pages[-1])
    step = int(pages[1]) - first if len(pages) > 1 else 1
    found = range(first, first + step * len(pages), step) if step > 0 else range(0)
    if len(found) == 0 or found[-1] != last:
        return None
    if isinstance(pages, np.ndarray):
        return found if bool((np.diff(pages) == step).all()) else None
    return found if tuple(pages) == tuple(found) else None


def as_ids(pages: Ids) -> NDArray[np.int64]:
    """The pages as an array; no copy if they are one of that type."""
    if isinstance(pages, range):
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.int64)
    return np.asarray(pages, np.int64)


def rows_of(buffer: bytearray | bytes | memoryview, page_bytes: int) -> Rows:
    """A buffer as pages, no copy. Raises ValueError if it does not hold whole pages."""
    return np.frombuffer(buffer, np.uint8).reshape(-1, page_bytes)


def _copy_stretches(
    source: Rows, sources: NDArray[np.int64], target: Rows, targets: NDArray[np.int64], steps: Steps
) -> None:
    """Stretches at one distance by one call each, if they are long enough for that."""
    changed = (steps[0][1:] != steps[0][:-1]) | (steps[1][1:] != steps[1][:-1])
    changes = np.flatnonzero(changed) + 1
    if changes.size * _LONG_STRETCH_PAGES > 2 * sources.size:  # a stretch ends in two changes
        return _scatter(source, sources, target, targets)
    low = 0
    for end in (*changes.tolist(), sources.size - 1):  # steps before `end` are equal, back to the change before
        high = end + 1
        if high <= low:
            continue
        step, target_step = (int(side[low]) if high - low > 1 else 1 for side in steps)
        if step > 0 and target_step > 0:
            of, to = slice(sources[low], sources[end] + 1, step), slice(targets[low], targets[end] + 1, target_step)
            target[to] = source[of]
        else:  # falling, or the same page again
            _scatter(source, sources[low:high], target, targets[low:high])
        low = high
    return None


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
