"""Same host: this process writes straight into the peer's pages."""

from collections.abc import Sequence

from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.pages import Rows
from kvstore.transport.shared_pages import SharedPages


class ShmChannel:
    """Channel from local pages into a peer's mapped memory. The mapping is the share's: closing this leaves it."""

    kind = "shm"

    def __init__(self, source: Rows, target: SharedPages) -> None:
        self._source, self._target = source, target

    def posted(self, span: KvSpan) -> None:
        """What was launched on the host is done."""

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """Write the pages. Raises PeerFailed if the memory is unmapped, or the pages are not the peer's."""
        n_copies = self._target.write(target_pages, self._source, source_pages)
        return Copied(n_copies, len(source_pages) * self._source.shape[1])

    def close(self) -> None:
        """Nothing to do: the copier closes between two copies."""
        del self._source
