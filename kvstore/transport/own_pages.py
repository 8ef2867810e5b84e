"""Whole pages of this process's pool, wherever it lies, to and from a peer's mapped memory, and as payloads."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.errors import PeerFailed, ProtocolViolation
from common.kv_layout import KvLayout
from common.net.sockets import Payload
from kvstore.memory.page_pool import PagePool
from kvstore.transport.cuda_pages import CudaSharedPages
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.layer_events import LayerEvents, Marks, NoLayerEvents
from kvstore.transport.page_mover import PageMover, PageNumbers
from kvstore.transport.pages import Ids, Rows, as_ids, copy_pages, count_pieces, rows_of
from kvstore.transport.pinned_mapping import PinnedMapping
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.staging import Part, StagingRing
from kvstore.transport.tcp import read_payload, write_payload


class OwnPages(Protocol):
    """Used by one thread; a process has one for each thread that moves pages. All bytes are there on return."""

    @property
    def layout(self) -> KvLayout:
        """Shape of a page."""
        ...

    @property
    def n_pages(self) -> int:
        """Pages that have memory."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        ...

    def marks(self, layers: Iterable[int]) -> Marks:
        """What a copy of these layers that is posted now waits for. Any thread may ask."""
        ...

    def copy_out(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids, after: Marks | None = None) -> int:
        """Ours into the peer's; returns how many contiguous pieces those were. Raises PeerFailed.

        `after`: of the layers that `own_pages` are of, which may be being computed; None: what is launched by now.
        """
        ...

    def copy_in(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids) -> int:
        """The peer's into ours; returns how many contiguous pieces those were. Raises PeerFailed."""
        ...

    def read(self, pages: Sequence[int], after: Marks | None = None) -> Payload:
        """The bytes of our pages, one after the other. Raises IndexError, PeerFailed."""
        ...

    def write(self, pages: Sequence[int], payload: Payload) -> None:
        """One payload into our pages. Raises ProtocolViolation if it does not fit, IndexError, PeerFailed."""
        ...


class HostPages:
    """Pages in the host's memory. Nothing waits for layers there: what was launched is done."""

    device = torch.device("cpu")

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    @property
    def layout(self) -> KvLayout:
        """Shape of a page."""
        return self._pool.layout

    @property
    def n_pages(self) -> int:
        """Pages that have memory."""
        return self._pool.n_pages

    @property
    def rows(self) -> Rows:
        """All pages as bytes."""
        return self._pool.rows

    def marks(self, layers: Iterable[int]) -> Marks:
        """What a copy of these layers that is posted now waits for. Any thread may ask."""
        return Marks()

    def copy_out(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids, after: Marks | None = None) -> int:
        """Ours into the peer's; returns how many contiguous pieces those were. Raises PeerFailed."""
        return _in_file(peer).write(peer_pages, self._pool.rows, own_pages)

    def copy_in(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids) -> int:
        """The peer's into ours; returns how many contiguous pieces those were. Raises PeerFailed."""
        return _in_file(peer).read_into(self._pool.rows, own_pages, peer_pages)

    def read(self, pages: Sequence[int], after: Marks | None = None) -> Payload:
        """The bytes of our pages, one after the other. Raises IndexError."""
        return read_payload(self._pool.rows, pages)

    def write(self, pages: Sequence[int], payload: Payload) -> None:
        """One payload into our pages. Raises ProtocolViolation, IndexError."""
        write_payload(self._pool.rows, pages, payload)


class AcceleratorPages:
    """Pages in an accelerator's memory.

    To and from a peer's device pages: one kernel. To and from a peer's file: by the device itself if the file's mapping
    is pinned, else through pinned buffers, as payloads are.
    """

    def __init__(self, pool: PagePool, events: LayerEvents) -> None:
        self._pool, self._events = pool, events
        self._mover = PageMover(pool.tensor.device)
        self._ring = StagingRing(self._mover, pool.layout.page_bytes)

    @property
    def layout(self) -> KvLayout:
        """Shape of a page."""
        return self._pool.layout

    @property
    def n_pages(self) -> int:
        """Pages that have memory."""
        return self._pool.n_pages

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._mover.device

    def marks(self, layers: Iterable[int]) -> Marks:
        """What a copy of these layers that is posted now waits for. Any thread may ask."""
        return self._events.marks(layers)

    def copy_out(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids, after: Marks | None = None) -> int:
        """Ours into the peer's; returns how many contiguous pieces those were. Raises PeerFailed."""
        own, there = self._own_ids(own_pages), as_ids(peer_pages)
        _require_as_many(own, there)
        self._wait(after)
        if isinstance(peer, CudaSharedPages):
            with peer.using() as rows:
                _require_there(there, len(rows), str(peer.description.peer))
                self._run(self._rows(), own, rows, there)
        else:
            self._out_to_file(own, _in_file(peer), there)
        return count_pieces(own, there)

    def copy_in(self, own_pages: Ids, peer: MappedPages, peer_pages: Ids) -> int:
        """The peer's into ours; returns how many contiguous pieces those were. Raises PeerFailed."""
        own, there = self._own_ids(own_pages), as_ids(peer_pages)
        _require_as_many(own, there)
        if isinstance(peer, CudaSharedPages):
            with peer.using() as rows:
                _require_there(there, len(rows), str(peer.description.peer))
                self._run(rows, there, self._rows(), own)
        else:
            self._in_from_file(own, _in_file(peer), there)
        return count_pieces(own, there)

    def read(self, pages: Sequence[int], after: Marks | None = None) -> Payload:
        """The bytes of our pages, one after the other. Raises PeerFailed, also for pages that do not exist."""
        own = self._own_ids(pages)
        payload = bytearray(len(own) * self.layout.page_bytes)
        target = rows_of(payload, self.layout.page_bytes)
        self._wait(after)

        def take(rows: Rows, part: Part) -> None:
            target[slice(*part)] = rows

        self._ring.take_out(self._rows(), own, take)
        return payload

    def write(self, pages: Sequence[int], payload: Payload) -> None:
        """One payload into our pages. Raises ProtocolViolation, PeerFailed, also for pages that do not exist."""
        own, page_bytes = self._own_ids(pages), self.layout.page_bytes
        if len(payload) != len(own) * page_bytes:
            raise ProtocolViolation(f"a payload of {len(payload)} bytes for {len(own)} pages of {page_bytes}")
        source = rows_of(payload, page_bytes)

        def fill(rows: Rows, part: Part) -> None:
            rows[:] = source[slice(*part)]

        self._ring.bring_in(fill, self._rows(), own)

    def _out_to_file(self, own: PageNumbers, peer: SharedPages, peer_pages: PageNumbers) -> None:
        peer.renew_pinning()
        with peer.using() as rows:
            places = as_ids(peer.rows_for(peer_pages))
            pinned = peer.pinning
            if isinstance(pinned, PinnedMapping) and pinned.covers(places):
                with self._mover.launching():
                    self._mover.move_out(self._rows(), own, pinned.rows, places - pinned.first_row)
                    self._mover.finish()
                return

            def take(staged: Rows, part: Part) -> None:
                copy_pages(staged, range(len(staged)), rows, places[slice(*part)])

            self._ring.take_out(self._rows(), own, take)

    def _in_from_file(self, own: PageNumbers, peer: SharedPages, peer_pages: PageNumbers) -> None:
        peer.renew_pinning()
        with peer.using() as rows:
            places = as_ids(peer.rows_for(peer_pages))
            pinned = peer.pinning
            if isinstance(pinned, PinnedMapping) and pinned.covers(places):
                with self._mover.launching():
                    self._mover.move_in(pinned.rows, places - pinned.first_row, self._rows(), own)
                    self._mover.finish()
                return

            def fill(staged: Rows, part: Part) -> None:
                copy_pages(rows, places[slice(*part)], staged, range(len(staged)))

            self._ring.bring_in(fill, self._rows(), own)

    def _wait(self, after: Marks | None) -> None:
        with self._mover.launching():
            (after or self._events.marks()).wait()

    def _run(self, source: Tensor, source_pages: PageNumbers, target: Tensor, target_pages: PageNumbers) -> None:
        with self._mover.launching():
            try:
                self._mover.move(source, source_pages, target, target_pages)
            finally:
                self._mover.finish()  # both memories may go once this returns

    def _rows(self) -> Tensor:
        """The pool as it is now: it may have grown since."""
        pages = self._pool.tensor
        return pages.view(torch.uint8).view(len(pages), self.layout.page_bytes)

    def _own_ids(self, pages: Ids) -> PageNumbers:
        ids = as_ids(pages)
        _require_there(ids, self.n_pages, "this process")
        return ids


def own_pages_of(pool: PagePool, events: LayerEvents | None = None) -> OwnPages:
    """Whichever fits the pool, for one thread. `events`: the engine's marks; None if it marks nothing."""
    if pool.tensor.device.type == "cpu":
        return HostPages(pool)
    return AcceleratorPages(pool, events or NoLayerEvents())


def _in_file(peer: MappedPages) -> SharedPages:
    if not isinstance(peer, SharedPages):
        raise PeerFailed(f"the pages of {peer.description.peer} lie on a device, which this process does not use")
    return peer


def _require_there(ids: PageNumbers, n_pages: int, whose: str) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < n_pages:
        raise PeerFailed(f"{whose} has pages 0 to {n_pages - 1}; {int(ids.min())} to {int(ids.max())} were asked for")


def _require_as_many(own: PageNumbers, there: PageNumbers) -> None:
    if own.size != there.size:
        raise PeerFailed(f"{own.size} pages of ours for {there.size} of the peer")
