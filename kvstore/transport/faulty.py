"""Copies of KV that meet the fault kit: hand-overs by a channel, and whole blocks by the block mover.

A copy strikes its point when everything that allows it has been checked and before a byte moves: one that is delayed
there is a late writer, or a late reader.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from common.errors import PeerFailed
from common.faults.plan import Outcome
from common.faults.points import Kind, Point, Side
from common.ids import PeerId
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from common.net.fault_kit import FaultKit
from common.net.sockets import Payload
from kvstore.transport.channel import Channel, Copied
from kvstore.transport.cuda_pages import CudaSharedPages
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.layer_events import Marks
from kvstore.transport.own_pages import OwnPages
from kvstore.transport.pages import Ids
from kvstore.transport.shared_pages import SharedPages

Sleep = Callable[[float], None]
"""Takes seconds."""


class FaultyChannel:
    """A channel whose copies strike `transfer`."""

    def __init__(
        self, inner: Channel, kit: FaultKit, peer: PeerId, mapping: MappedPages | None, sleep: Sleep = time.sleep
    ) -> None:
        """`mapping`: the peer's memory, if the channel writes there; else the bytes travel as payloads."""
        self._inner, self._kit, self._peer, self._mapping, self._sleep = inner, kit, peer, mapping, sleep

    @property
    def kind(self) -> str:
        """That of the channel inside."""
        return self._inner.kind

    def posted(self, span: KvSpan) -> None:
        """As the channel inside."""
        self._inner.posted(span)

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """As the channel inside, with faults. Raises PeerFailed."""
        outcome = self._kit.strike(Point.TRANSFER, Side.WORK, self._peer)
        _begin(outcome, self._sleep, f"copy of layer {span.layer} to {self._peer}")
        copied = self._inner.copy(span, source_pages, target_pages)
        if outcome.has(Kind.CORRUPT):
            if self._mapping is not None:
                spoil(self._mapping, target_pages)
            if copied.payload is not None:
                return replace(copied, payload=_flipped(copied.payload))
        return copied

    def close(self) -> None:
        """Close the channel inside."""
        self._inner.close()


class FaultyPages:
    """Own pages of the block mover's thread: copies from peers strike `fetch`, to them `spill`, host buffer `park`."""

    def __init__(self, inner: OwnPages, kit: FaultKit, host_buffer: PeerId, sleep: Sleep = time.sleep) -> None:
        """`host_buffer`: as whose memory this process's own buffer is mapped."""
        self._inner, self._kit, self._host_buffer, self._sleep = inner, kit, host_buffer, sleep

    @property
    def layout(self) -> KvLayout:
        """Shape of a page."""
        return self._inner.layout

    @property
    def n_pages(self) -> int:
        """Pages that have memory."""
        return self._inner.n_pages

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._inner.device

    def marks(self, layers: Iterable[int]) -> Marks:
        """As the pages inside."""
        return self._inner.marks(layers)

    def copy_out(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids, after: Marks | None = None) -> int:
        """As the pages inside, with faults. Raises PeerFailed."""
        outcome = self._strike(peer, Point.SPILL)
        n_copies = self._inner.copy_out(own_pages, peer, peer_pages, after)
        if outcome.has(Kind.CORRUPT):
            spoil(peer, peer_pages)
        return n_copies

    def copy_in(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids) -> int:
        """As the pages inside, with faults. Raises PeerFailed."""
        outcome = self._strike(peer, Point.FETCH)
        n_copies = self._inner.copy_in(own_pages, peer, peer_pages)
        if outcome.has(Kind.CORRUPT) and len(own_pages):
            last = [int(np.asarray(own_pages).ravel()[-1])]
            self._inner.write(last, _flipped(self._inner.read(last)))
        return n_copies

    def read(self, pages: Sequence[int], after: Marks | None = None) -> Payload:
        """As the pages inside."""
        return self._inner.read(pages, after)

    def write(self, pages: Sequence[int], payload: Payload) -> None:
        """As the pages inside."""
        self._inner.write(pages, payload)

    def _strike(self, peer: MappedPages, point: Point) -> Outcome:
        name = peer.description.peer
        if name == self._host_buffer:
            point = Point.PARK
        outcome = self._kit.strike(point, Side.WORK, name)
        _begin(outcome, self._sleep, f"{point} copy, {name}")
        return outcome


def spoil(peer: MappedPages, pages: Ids) -> None:
    """One byte of the last of these pages of the peer's memory becomes another one. Raises PeerFailed."""
    if not len(pages):
        return
    last = int(np.asarray(pages).ravel()[-1])
    if isinstance(peer, SharedPages):
        row = peer.read([last])
        row[0, row.shape[1] // 2] ^= 0xFF
        peer.write([last], row, [0])
    elif isinstance(peer, CudaSharedPages):
        with peer.using() as rows:
            rows[last, :1] ^= 0xFF
            torch.cuda.synchronize(rows.device)


def _begin(outcome: Outcome, sleep: Sleep, what: str) -> None:
    """What comes before the bytes. Raises PeerFailed."""
    late_ms = outcome.ms_of(Kind.DELAY)
    if late_ms:
        sleep(late_ms / 1000)
    if outcome.has(Kind.FAIL, Kind.CUT):
        raise PeerFailed(f"injected failure: {what}")


def _flipped(payload: Payload) -> bytearray:
    changed = bytearray(payload)
    if changed:
        changed[len(changed) // 2] ^= 0xFF
    return changed
