"""Which (layer, block) pairs of a transfer are there: a bitmap, so that repeats and reordering are harmless."""

from common.messages.handover import KvSpan


class Coverage:
    """Bits for blocks `first_block` to `n_blocks - 1` of every layer."""

    __slots__ = ("_first_block", "_missing", "_n_blocks")

    def __init__(self, layers: int, first_block: int, n_blocks: int) -> None:
        self._first_block, self._n_blocks = first_block, n_blocks
        self._missing = [(1 << (n_blocks - first_block)) - 1] * layers

    @property
    def complete(self) -> bool:
        """True if nothing is missing; at once for a transfer of no blocks."""
        return not any(self._missing)

    def fits(self, span: KvSpan) -> bool:
        """True if the span lies inside the transfer."""
        inside = self._first_block <= span.first_block <= span.first_block + span.n_blocks <= self._n_blocks
        return inside and 0 <= span.layer < len(self._missing) and span.n_blocks > 0

    def lacks(self, span: KvSpan) -> bool:
        """True if any pair of the span is missing."""
        return bool(self._missing[span.layer] & self._bits(span))

    def add(self, span: KvSpan) -> None:
        """The span is there. It must fit."""
        self._missing[span.layer] &= ~self._bits(span)

    def _bits(self, span: KvSpan) -> int:
        return ((1 << span.n_blocks) - 1) << (span.first_block - self._first_block)
