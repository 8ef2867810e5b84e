"""One way of moving spans of KV to one peer."""

from collections.abc import Sequence
from typing import Protocol

from common.messages.handover import KvSpan
from common.net.sockets import Payload


class Channel(Protocol):
    """Used by the copier's thread alone; `close` too."""

    @property
    def kind(self) -> str:
        """`shm` or `tcp`."""
        ...

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Payload | None:
        """Move one span; None if it is in the target pages now, else the payload that must travel with KvSent.

        Raises PeerFailed; the target pages may then hold anything.
        """
        ...

    def close(self) -> None:
        """Nothing is written after this returns."""
        ...
