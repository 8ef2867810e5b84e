"""Checksums that a worker knows of pages that are not its own: found at others, stored with others, kept in the host buffer.

Owned by the loop's thread. A found run's leave with its Release or the holder; a stored batch's with its Publish or the
store; the host buffer's stay until their page is written again.
"""

import msgspec
import numpy as np

from common.ids import PeerId
from common.messages.base import Message
from common.messages.blocks import Found, Publish, Release
from kvstore.index.ledger import PageIds
from kvstore.transport.block_jobs import StoreJob
from kvstore.transport.checksums import UNKNOWN, Checksums, Expected, in_rows
from services.worker.core.host_buffer import HOST_BUFFER


class KnownChecksums:
    """By page number of the process that has the page."""

    def __init__(self) -> None:
        self._found: dict[tuple[PeerId, int], dict[int, int]] = {}
        self._stored: dict[tuple[PeerId, int], tuple[Checksums, ...]] = {}
        self._parked: dict[int, int] = {}

    def on_found(self, peer: PeerId, message: Found) -> None:
        """A run was found, to be read by shared memory; its shape was checked."""
        if message.checksums and message.pages:
            pairs = zip(message.pages, message.checksums, strict=True)
            found = {page: sum_ for row in pairs for page, sum_ in zip(*row, strict=True)}
            self._found[peer, message.call] = found

    def expected(self, peer: PeerId, call: int, peer_pages: PageIds) -> Expected | None:
        """What these pages must be when they are fetched; None: it is known of none of them."""
        known = self._parked if peer == HOST_BUFFER else self._found.get((peer, call), {})
        if not known:
            return None
        sums = [known.get(page, UNKNOWN) for page in peer_pages.ravel().tolist()]
        return np.array(sums, np.int64).reshape(peer_pages.shape)

    def on_stored(self, job: StoreJob, checksums: Checksums) -> None:
        """Our pages lie with the peer now."""
        if job.peer == HOST_BUFFER:
            self._parked.update(zip(job.peer_pages.ravel().tolist(), checksums, strict=True))
        else:
            self._stored[job.peer, job.call] = in_rows(checksums, job.own_pages.shape[1])

    def told(self, to: PeerId, message: Message) -> Message:
        """The message as it shall be sent: Publish tells what was written. What nobody needs any more is forgotten."""
        if isinstance(message, Release):
            self._found.pop((to, message.call), None)
        elif isinstance(message, Publish):
            stored = self._stored.pop((to, message.call), None)
            if stored is not None and message.ok:
                return msgspec.structs.replace(message, checksums=stored)
        return message

    def forget(self, peer: PeerId) -> None:
        """The peer is gone, and what it kept with it."""
        for known in (self._found, self._stored):
            for key in [key for key in known if key[0] == peer]:
                del known[key]

    def __len__(self) -> int:
        """Exchanges that are remembered."""
        return len(self._found) + len(self._stored)
