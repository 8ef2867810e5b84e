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
        blocks = self._first_block <= span.first_block <= span.first_block + span.n_blocks <= self._n_blocks
        layers = 0 <= span.layer < span.layer + span.n_layers <= len(self._missing)
        return blocks and layers and span.n_blocks > 0

    def lacks(self, span: KvSpan) -> bool:
        """True if any pair of the span is missing."""
        bits = self._bits(span)
        return any(missing & bits for missing in self._missing[span.layer : span.layer + span.n_layers])

    def add(self, span: KvSpan) -> None:
        """The span is there. It must fit."""
        bits = self._bits(span)
        for layer in range(span.layer, span.layer + span.n_layers):
            self._missing[layer] &= ~bits

    def _bits(self, span: KvSpan) -> int:
        return ((1 << span.n_blocks) - 1) << (span.first_block - self._first_block)
