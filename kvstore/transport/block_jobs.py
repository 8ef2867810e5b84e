"""What the block mover is asked to do, what it tells, and the pieces in which it works."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.ids import PeerId
from kvstore.index.ledger import PageIds
from kvstore.transport.checksums import Checksums, Expected

RUN_BYTES = 64 * 1024
"""Of one block in a by-layer fetch, at least: small pages of several layers go together, or the copies are too short."""
PIECE_BYTES = 8 * 2**20
"""Copied at once, if a block is not larger; between two pieces a more urgent job may go first."""


@dataclass(frozen=True, slots=True, eq=False)
class StoreJob:
    """Our blocks into the peer's pages. All pages stay what they are until the job's end was told."""

    call: int
    peer: PeerId
    own_pages: PageIds
    """[blocks, layers], as `peer_pages`."""
    peer_pages: PageIds
    ring: int | None = None
    """The gate's call of the ring of pages that `own_pages` are a row of."""
    free_layer: int | None = None
    """Up to which layer the ring may be written when this has ended, well or not; None: the ring is over then."""


@dataclass(frozen=True, slots=True, eq=False)
class FetchJob:
    """The peer's blocks into our pages, which nobody else touches until the job's end was told."""

    call: int
    peer: PeerId
    own_pages: PageIds
    """[blocks, layers], as `peer_pages`."""
    peer_pages: PageIds
    deadline_ms: float
    """End of the lease, on our clock. What a copy read that ended later may have been anybody's: it has failed."""
    by_layer: bool
    """The first layers of all blocks first, then the next ones; else block by block."""
    layers: tuple[int, ...] = ()
    """Which layers the columns are, rising; none named: all, from 0 on. Those between them are there already."""
    expected: Expected | None = None
    """[blocks, layers] checksums that the pages must have when they have come; None: nobody knows any."""

    def layer_of(self, column: int) -> int:
        """Of the page arrays."""
        return self.layers[column] if self.layers else column

    def readable_layer(self, n_columns: int) -> int:
        """Up to which layer all is there when the first `n_columns` have come; -1: none is."""
        return self.layers[n_columns] - 1 if n_columns < len(self.layers) else self.layer_of(n_columns - 1)


BlockJob = StoreJob | FetchJob


@dataclass(frozen=True, slots=True)
class LayerFetched:
    """One layer of all blocks of a `by_layer` job: it is there; or the first one that is not, and none will follow."""

    call: int
    layer: int
    ok: bool


@dataclass(frozen=True, slots=True)
class BlockJobDone:
    """The end of one job, good or bad: every posted job has exactly one, and it is the last that is told of it."""

    call: int
    ok: bool
    n_bytes: int
    """That were moved, also by a job that failed later; as `n_copies`."""
    n_copies: int
    """Contiguous pieces."""
    elapsed_ms: float
    """Of the copying alone; 0 if it never began."""
    error_text: str
    checksums: Checksums = ()
    """Of a StoreJob of a mover that verifies: of our pages, block by block."""
    checked_pages: int = 0
    """Of a FetchJob; as the next two."""
    wrong_pages: int = 0
    wrong_peer_pages: tuple[int, ...] = ()
    """The peer's pages that came wrong."""
    unchecked_pages: int = 0
    """Of which nobody knew a checksum."""


BlockEvent = LayerFetched | BlockJobDone


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a job, copied at once."""

    own_pages: PageIds
    peer_pages: PageIds
    columns_there: range = range(0)
    """Columns of the job that are complete with this piece."""
    expected: Expected | None = None
    """Of its pages."""


def require_alike(job: BlockJob) -> None:
    """Raise ValueError unless both sides are [blocks, layers] of one shape, and named layers rise."""
    if job.own_pages.ndim != 2 or job.own_pages.shape != job.peer_pages.shape:
        raise ValueError(f"call {job.call}: own pages {job.own_pages.shape}, peer's pages {job.peer_pages.shape}")
    expected = job.expected if isinstance(job, FetchJob) else None
    if expected is not None and expected.shape != job.own_pages.shape:
        raise ValueError(f"call {job.call}: checksums {expected.shape} for pages {job.own_pages.shape}")
    named = job.layers if isinstance(job, FetchJob) else ()
    if named and (len(named) != job.own_pages.shape[1] or list(named) != sorted(set(named))):
        raise ValueError(
            f"call {job.call}: layers {named} for {job.own_pages.shape[1]} columns of pages; they must rise"
        )


def pieces(job: BlockJob, max_pages: int, layers_at_once: int = 1) -> Iterator[Piece]:
    """All of the job, at most `max_pages` pages at once or one block. `layers_at_once`: of a `by_layer` job."""
    n_blocks, layers = job.own_pages.shape
    expected = job.expected if isinstance(job, FetchJob) else None
    if isinstance(job, FetchJob) and job.by_layer:
        for first in range(0, layers if n_blocks else 0, layers_at_once):
            end = min(layers, first + layers_at_once)
            step = max(1, max_pages // (end - first))
            for low in range(0, n_blocks, step):
                part = slice(low, low + step), slice(first, end)
                there = range(first, end) if low + step >= n_blocks else range(0)
                sums = None if expected is None else expected[part].reshape(-1)
                yield Piece(job.own_pages[part].reshape(-1), job.peer_pages[part].reshape(-1), there, sums)
        return
    step = max(1, max_pages // max(1, layers))
    for low in range(0, n_blocks, step):
        whole = slice(low, low + step)
        sums = None if expected is None else expected[whole].reshape(-1)
        yield Piece(job.own_pages[whole].reshape(-1), job.peer_pages[whole].reshape(-1), expected=sums)
