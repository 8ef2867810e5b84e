"""One byte of KV turned over on its way, once, in the place where a real copy would go wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any  # Any: whatever the copies take

import pytest

from common.messages.blocks import Found, Put
from common.net.sockets import Exchange
from kvstore.server.service import KvStoreService
from kvstore.transport.own_pages import HostPages
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.shm import ShmChannel
from kvstore.transport.tcp import TcpChannel
from services.worker.core.host_buffer import HOST_BUFFER


@dataclass
class Flip:
    """Turns over the last bit of the first byte it is shown, and nothing after that."""

    done: bool = False

    def byte(self, buffer: Any) -> None:
        if not self.done:
            self.done = True
            buffer[0] ^= 1


Way = Callable[[pytest.MonkeyPatch, Flip], None]


def handover_shm(patch: pytest.MonkeyPatch, flip: Flip) -> None:
    """The page that was written into the decode worker's memory."""
    real = ShmChannel.copy

    def copy(self: ShmChannel, span: Any, source: Sequence[int], target: Sequence[int]) -> Any:
        copied = real(self, span, source, target)
        with self._target.using() as rows:
            flip.byte(rows[self._target.rows_for(target)[0]])
        return copied

    patch.setattr(ShmChannel, "copy", copy)


def handover_tcp(patch: pytest.MonkeyPatch, flip: Flip) -> None:
    """The payload that travels."""
    real = TcpChannel.copy

    def copy(self: TcpChannel, span: Any, source: Sequence[int], target: Sequence[int]) -> Any:
        copied = real(self, span, source, target)
        flip.byte(copied.payload)
        return copied

    patch.setattr(TcpChannel, "copy", copy)


def _frames(kind: type) -> Way:
    def way(patch: pytest.MonkeyPatch, flip: Flip) -> None:
        real = Exchange.send

        def send(self: Exchange, peer: Any, message: Any, payloads: Any = ()) -> bool:
            if isinstance(message, kind) and payloads:
                payloads = [bytearray(payload) for payload in payloads]
                flip.byte(payloads[-1])
            return real(self, peer, message, payloads)

        patch.setattr(Exchange, "send", send)

    return way


spill_tcp, fetch_tcp = _frames(Put), _frames(Found)
"""The last frame of a message."""


def spill_shm(patch: pytest.MonkeyPatch, flip: Flip) -> None:
    """The page that was written into the store's memory."""
    real = HostPages.copy_out

    def copy_out(self: HostPages, own: Any, peer: Any, pages: Any, after: Any = None) -> int:
        copied = real(self, own, peer, pages, after)
        if isinstance(peer, SharedPages) and peer.description.peer.startswith("kvstore"):
            with peer.using() as rows:
                flip.byte(rows[peer.rows_for(pages)[0]])
        return copied

    patch.setattr(HostPages, "copy_out", copy_out)


def lying(patch: pytest.MonkeyPatch, flip: Flip) -> None:
    """A page in the store's memory, when a reader is told of it: it stays wrong."""
    real = KvStoreService._sealed

    def sealed(self: KvStoreService, answer: Any, blocks: Any) -> Any:
        if isinstance(answer, Found) and answer.n_blocks:
            first, *_ = answer.pages or blocks
            flip.byte(self._memory.parts((first[0],))[0])
        return real(self, answer, blocks)

    patch.setattr(KvStoreService, "_sealed", sealed)


def _copied_in(wanted: Callable[[str], bool]) -> Way:
    def way(patch: pytest.MonkeyPatch, flip: Flip) -> None:
        real = HostPages.copy_in

        def copy_in(self: HostPages, own: Any, peer: Any, pages: Any) -> int:
            copied = real(self, own, peer, pages)
            if wanted(peer.description.peer):
                flip.byte(self.rows[int(own[-1])])
            return copied

        patch.setattr(HostPages, "copy_in", copy_in)

    return way


fetch_store = _copied_in(lambda peer: peer.startswith("kvstore"))
fetch_peer = _copied_in(lambda peer: peer.startswith(("prefill", "decode")))
fetch_parked = _copied_in(lambda peer: peer == HOST_BUFFER)


@contextmanager
def flipped(way: Way) -> Iterator[Flip]:
    """One byte, once, while this lasts."""
    flip = Flip()
    with pytest.MonkeyPatch.context() as patch:
        way(patch, flip)
        yield flip
