"""From an accelerator's pages to any host: the span goes through pinned host memory and travels as a payload."""

from collections.abc import Sequence

from common.errors import PeerFailed
from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.device_channel import PostedMarks
from kvstore.transport.own_pages import OwnPages
from kvstore.transport.pages import count_pieces


class StagedChannel:
    """Channel that reads device pages into payloads for the Exchange; on the wire it is tcp."""

    kind = "tcp"

    def __init__(self, source: OwnPages) -> None:
        self._source, self._marks = source, PostedMarks(source)

    def posted(self, span: KvSpan) -> None:
        """Its layers have been launched."""
        self._marks.add(span)

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """The span's pages, one after the other. Raises PeerFailed, also if there is no memory for the copy now."""
        marks = self._marks.take(span)
        if len(source_pages) != len(target_pages):
            raise PeerFailed(f"{span}: {len(source_pages)} pages for {len(target_pages)} granted ones")
        payload = self._source.read(source_pages, marks)
        return Copied(count_pieces(source_pages, range(len(source_pages))), len(payload), payload)

    def close(self) -> None:
        """Nothing is held."""
        del self._source
