"""From an accelerator's pages into memory of a peer that is mapped here: its device pages, or its file on the host."""

from collections import deque
from collections.abc import Sequence

from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.layer_events import Marks
from kvstore.transport.own_pages import OwnPages


class PostedMarks:
    """What copies that are queued wait for, in their order. The loop's thread adds, the copier's takes."""

    def __init__(self, source: OwnPages) -> None:
        self._source = source
        self._waiting: deque[tuple[KvSpan, Marks]] = deque()  # its ends may be used from two threads at once

    def add(self, span: KvSpan) -> None:
        """A copy is queued: the marks of its layers as they are now."""
        self._waiting.append((span, self._source.marks(range(span.layer, span.layer + span.n_layers))))

    def take(self, span: KvSpan) -> Marks:
        """Those of the copy that begins now; those of copies before it that never began are dropped.

        Of a copy that was never queued: the marks as they are now.
        """
        while self._waiting:
            posted, marks = self._waiting.popleft()
            if posted == span:
                return marks
        return self._source.marks(range(span.layer, span.layer + span.n_layers))


class DeviceChannel:
    """Channel that lets the device write straight into the granted pages; its kind is that of the mapping.

    The copy waits on the device for the layers that it moves, not for the whole step, and on the host for its own end:
    KvSent may be sent as soon as `copy` has returned. The mapping is the share's: closing this leaves it.
    """

    def __init__(self, source: OwnPages, target: MappedPages) -> None:
        self._source, self._target = source, target
        self._marks = PostedMarks(source)
        self.kind = target.kind

    def posted(self, span: KvSpan) -> None:
        """Its layers have been launched."""
        self._marks.add(span)

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """Write the pages. Raises PeerFailed if the memory is unmapped, or the pages are not the peer's."""
        n_copies = self._source.copy_out(source_pages, self._target, target_pages, self._marks.take(span))
        return Copied(n_copies, len(source_pages) * self._source.layout.page_bytes)

    def close(self) -> None:
        """Nothing to do: the copier closes between two copies."""
        del self._source
