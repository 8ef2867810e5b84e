"""Checksums that a worker knows of pages that are not its own: found at others, stored with others, kept in the host buffer.

Owned by the loop's thread. A found run's leave with its Release or the holder; a stored batch's with the Stored
that answers its Publish, or with the store; the host buffer's stay until their page is written again.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.blocks import Find, Found, Publish, Release, Stored
from kvstore.index.ledger import PageIds
from kvstore.transport.block_jobs import BlockJob, BlockJobDone, StoreJob
from kvstore.transport.checksums import UNKNOWN, Checksums, Expected, in_rows
from services.worker.core.actions import Action
from services.worker.core.host_buffer import HOST_BUFFER

_MAX_ASKED = 256
"""Finds whose names are remembered; older ones have been answered or given up."""


class KnownChecksums:
    """By page number of the process that has the page."""

    def __init__(self) -> None:
        self._found: dict[tuple[PeerId, int], dict[int, int]] = {}
        self._stored: dict[tuple[PeerId, int], tuple[Checksums, ...]] = {}
        self._parked: dict[int, int] = {}
        self._asked: dict[tuple[PeerId, int], tuple[bytes, ...]] = {}

    def on_answer(self, peer: PeerId, message: Found | Stored) -> None:
        """A peer found what we asked for, or has heard our Publish, which will not be said again."""
        if isinstance(message, Stored):
            self._stored.pop((peer, message.call), None)
        else:
            self.on_found(peer, message)

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

    def accusation(self, peer: PeerId, call: int, blocks: Sequence[int]) -> Release:
        """Tells who answered our Find `call` at which places of it blocks came wrong."""
        names = self._asked.get((peer, call), ())
        return Release(call=call, corrupt=tuple(names[block] for block in blocks if block < len(names)))

    def accusations(self, job: BlockJob, done: BlockJobDone) -> list[Action]:
        """The same for pages that were read. The host buffer is our own, and what it gave was for one reader."""
        if not done.wrong_peer_pages or job.peer == HOST_BUFFER:
            return []
        layers = job.peer_pages.shape[1]
        places = {page: place // layers for place, page in enumerate(self._found.get((job.peer, job.call), {}))}
        blocks = sorted({places[page] for page in done.wrong_peer_pages if page in places})
        return [Send(job.peer, self.accusation(job.peer, job.call, blocks))]

    def on_stored(self, job: StoreJob, checksums: Checksums) -> None:
        """Our pages lie with the peer now."""
        if job.peer == HOST_BUFFER:
            self._parked.update(zip(job.peer_pages.ravel().tolist(), checksums, strict=True))
        else:
            self._stored[job.peer, job.call] = in_rows(checksums, job.own_pages.shape[1])

    def told(self, to: PeerId, message: Message) -> Message:
        """The message as it shall be sent: Publish tells what was written. What nobody needs any more is forgotten."""
        if isinstance(message, Find):
            self._asked[to, message.call] = message.blocks
            if len(self._asked) > _MAX_ASKED:
                del self._asked[next(iter(self._asked))]
        elif isinstance(message, Release):
            self._asked.pop((to, message.call), None)
            self._found.pop((to, message.call), None)
        elif isinstance(message, Publish):
            stored = self._stored.get((to, message.call))
            if stored is not None and message.ok:
                return msgspec.structs.replace(message, checksums=stored)
        return message

    def forget(self, peer: PeerId) -> None:
        """The peer is gone, and what it kept with it."""
        for known in (self._found, self._stored, self._asked):
            for key in [key for key in known if key[0] == peer]:
                del known[key]

    def __len__(self) -> int:
        """Exchanges that are remembered."""
        return len(self._found) + len(self._stored)
