"""Checksums of what this worker has copied to decode workers, until the transfer is over: a KvSent may be said again.

The repeat of a KvSent names whole layers where the first ones named the pieces that were copied. Owned by the loop's thread. A
transfer's leave with the word that ends it, with the peer's channel, or when there are too many.
"""

from collections.abc import Iterator

from common.ids import PeerId, TransferId
from common.messages.base import Message
from common.messages.handover import Abort, Commit, KvSent, KvSpan, Stopped
from kvstore.transport.checksums import Checksums

_MOST_TRANSFERS = 1_024
"""Far above what is open at once; only what ended without a word is ever so old."""


class SentChecksums:
    """By transfer and span, in the order of the copies: of two that cover a page the later one counts."""

    def __init__(self) -> None:
        self._sent: dict[TransferId, tuple[PeerId, dict[KvSpan, Checksums]]] = {}

    def on_copied(self, to: PeerId, transfer: TransferId, span: KvSpan, checksums: Checksums) -> None:
        """A span lies with the decode worker now."""
        _, spans = self._sent.setdefault(transfer, (to, {}))
        spans.pop(span, None)
        spans[span] = checksums
        if len(self._sent) > _MOST_TRANSFERS:
            del self._sent[next(iter(self._sent))]

    def of(self, message: KvSent) -> tuple[Checksums, ...]:
        """[span][page in the span's order]; empty if one page's is not known."""
        _, spans = self._sent.get(message.transfer, ("", {}))
        if all(span in spans for span in message.spans):
            return tuple(spans[span] for span in message.spans)
        by_place = {
            place: sum_ for span, sums in spans.items() for place, sum_ in zip(_places(span), sums, strict=True)
        }
        if any(place not in by_place for span in message.spans for place in _places(span)):
            return ()
        return tuple(tuple(by_place[place] for place in _places(span)) for span in message.spans)

    def note(self, message: Message) -> None:
        """A word that was heard or is being said: one that ends a transfer ends what is known of it."""
        if isinstance(message, Commit | Stopped | Abort):
            self._sent.pop(message.transfer, None)

    def forget(self, peer: PeerId) -> None:
        """The peer is gone."""
        self._sent = {name: sent for name, sent in self._sent.items() if sent[0] != peer}

    def __len__(self) -> int:
        """Transfers that are remembered."""
        return len(self._sent)


def _places(span: KvSpan) -> Iterator[tuple[int, int]]:
    """Block and layer of each of its pages."""
    for block in range(span.first_block, span.first_block + span.n_blocks):
        for layer in range(span.layer, span.layer + span.n_layers):
            yield block, layer
