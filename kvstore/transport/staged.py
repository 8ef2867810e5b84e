"""From an accelerator's pages to any host: the span goes through host memory and travels as a payload."""

from collections.abc import Sequence

from common.errors import PeerFailed
from common.messages.handover import KvSpan
from common.net.sockets import Payload
from kvstore.memory.device import DevicePages


class StagedChannel:
    """Channel that reads device pages into payloads for the Exchange; on the wire it is tcp."""

    kind = "tcp"

    def __init__(self, source: DevicePages) -> None:
        self._source = source

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Payload:
        """The span's pages, one after the other. Raises PeerFailed."""
        if len(source_pages) != len(target_pages):
            raise PeerFailed(f"layer {span.layer}: {len(source_pages)} pages for {len(target_pages)} granted ones")
        return self._source.read(source_pages)

    def close(self) -> None:
        """Nothing is held."""
        del self._source
