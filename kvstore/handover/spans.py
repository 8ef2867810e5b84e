"""Spans of a grant: their pages in the order of KvSpan, and pieces of bounded size."""

from dataclasses import dataclass
from itertools import chain

from common.messages.handover import Grant, KvSpan


@dataclass(frozen=True, slots=True)
class Cut:
    """A span in two: what goes now, and what is left, if anything."""

    piece: KvSpan
    rest: KvSpan | None


def n_pages(span: KvSpan) -> int:
    """Pages that hold the span."""
    return span.n_blocks * span.n_layers


def granted_pages(grant: Grant, span: KvSpan) -> tuple[int, ...]:
    """The grant's pages for a span inside it: all the span's layers of the first block, then of the next."""
    low = span.first_block - grant.first_block
    rows = [row[low : low + span.n_blocks] for row in grant.pages[span.layer : span.layer + span.n_layers]]
    return rows[0] if len(rows) == 1 else tuple(chain.from_iterable(zip(*rows, strict=True)))


def cut(span: KvSpan, max_pages: int) -> Cut:
    """Whole blocks of at most `max_pages` pages, but one block at least, from the span's beginning."""
    n_blocks = max(1, max_pages // span.n_layers)
    if n_blocks >= span.n_blocks:
        return Cut(span, None)
    rest = KvSpan(span.layer, span.first_block + n_blocks, span.n_blocks - n_blocks, span.n_layers)
    return Cut(KvSpan(span.layer, span.first_block, n_blocks, span.n_layers), rest)


def clip(span: KvSpan, first_block: int) -> KvSpan | None:
    """The span without the blocks before `first_block`; None if nothing is left."""
    first = max(span.first_block, first_block)
    n_blocks = span.first_block + span.n_blocks - first
    return KvSpan(span.layer, first, n_blocks, span.n_layers) if n_blocks > 0 else None
