"""Which keys the tokens of a segment see, and which blocks hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.worker.core.plan import Segment

GROUP_KEYS = 4096
"""Keys of a group of decoding sequences, padding included, unless it is one sequence: so much is gathered at once."""


@dataclass(frozen=True, slots=True)
class Span:
    """Of one segment. Keys are counted from the sequence's first token."""

    ids: NDArray[np.int32]
    """[layers, blocks]: the pages from the first block on that one of the tokens sees."""
    first_key: int
    """The first key of the first block."""
    first_needed: int
    """The first key that the first token sees."""
    first_seen: int
    """The first key that the last token sees."""
    end: int
    """One past the last token itself."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.ids.shape[1]


def span_of(segment: Segment, window_tokens: int | None, block_tokens: int) -> Span:
    """With a window a token at i sees only the keys at j with i - j < window_tokens."""
    end = segment.start + segment.count
    first_needed = 0 if window_tokens is None else max(0, segment.start - window_tokens + 1)
    first_block = first_needed // block_tokens
    ids = segment.table.ids[:, first_block : -(-end // block_tokens)]
    first_seen = 0 if window_tokens is None else max(0, end - window_tokens)
    return Span(ids, first_block * block_tokens, first_needed, first_seen, end)


def of_like_length(spans: Sequence[Span], block_tokens: int, group_keys: int) -> list[list[int]]:
    """Places in `spans`, the longest first, in groups whose padding at most doubles what is read of them, with `group_keys`
    each at the most; a longer one, and with 0 every one, is a group by itself.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(spans)), key=lambda place: -spans[place].blocks):
        longest = spans[groups[-1][0]].blocks if groups else 0
        too_many = bool(groups) and (len(groups[-1]) + 1) * longest * block_tokens > group_keys
        if not groups or too_many or 2 * spans[place].blocks < longest:
            groups.append([])
        groups[-1].append(place)
    return groups


def padded_ids(spans: Sequence[Span]) -> NDArray[np.int64]:
    """Page ids [layers, sequences, blocks], each padded with its last page."""
    blocks = max(span.blocks for span in spans)
    ids = np.empty((spans[0].ids.shape[0], len(spans), blocks), dtype=np.int64)
    for row, span in enumerate(spans):
        ids[:, row, : span.blocks] = span.ids
        ids[:, row, span.blocks :] = span.ids[:, -1:]
    return ids


def seen_mask(spans: Sequence[Span], keys: int) -> NDArray[np.float32]:
    """[sequences, keys] for the last token of each: 0 where it sees the key, counted from its first one, -inf elsewhere."""
    at = np.array([span.first_key for span in spans])[:, None] + np.arange(keys)
    first_seen = np.array([span.first_seen for span in spans])[:, None]
    ends = np.array([span.end for span in spans])[:, None]
    return np.where((at >= first_seen) & (at < ends), np.float32(0.0), np.float32(-np.inf))
