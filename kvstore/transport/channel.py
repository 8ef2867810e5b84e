"""One way of moving spans of KV to one peer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages.handover import KvSpan
from common.net.sockets import Payload


@dataclass(frozen=True, slots=True)
class Copied:
    """What one copy moved."""

    n_copies: int
    """Contiguous pieces: stretches of pages that are neighbours on both sides (tcp: in our memory)."""
    n_bytes: int
    payload: Payload | None = None
    """What must travel with KvSent; None if the bytes are in the target pages now."""


class Channel(Protocol):
    """Used by the copier's thread alone, but for `posted`; `close` too. Each posted span is copied once, in order, or none any more."""

    @property
    def kind(self) -> str:
        """`cuda_ipc`, `shm` or `tcp`."""
        ...

    def posted(self, span: KvSpan) -> None:
        """A copy of this span was queued, behind those queued before: what it moves is launched now, if not done.

        The one call that comes from the loop's thread.
        """
        ...

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """Move one span; pages of both sides in the span's order, block by block.

        Raises PeerFailed; the target pages may then hold anything.
        """
        ...

    def close(self) -> None:
        """Nothing is written after this returns."""
        ...
