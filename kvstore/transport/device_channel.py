"""From an accelerator's pages into memory of a peer that is mapped here: its device pages, or its file on the host."""

from collections.abc import Sequence

from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.own_pages import OwnPages


class DeviceChannel:
    """Channel that lets the device write straight into the granted pages; its kind is that of the mapping.

    The copy waits on the device for the layers that it moves, not for the whole step, and on the host for its own end:
    KvSent may be sent as soon as `copy` has returned. The mapping is the share's: closing this leaves it.
    """

    def __init__(self, source: OwnPages, target: MappedPages) -> None:
        self._source, self._target = source, target
        self.kind = target.kind

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """Write the pages. Raises PeerFailed if the memory is unmapped, or the pages are not the peer's."""
        n_copies = self._source.copy_out(source_pages, self._target, target_pages, layers_of(span))
        return Copied(n_copies, len(source_pages) * self._source.layout.page_bytes)

    def close(self) -> None:
        """Nothing to do: the copier closes between two copies."""
        del self._source


def layers_of(span: KvSpan) -> range:
    """The layers whose pages a span moves."""
    return range(span.layer, span.layer + span.n_layers)
