"""The thread that moves whole blocks to and from other processes' memory while KV is handed over and computed."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from common.clock import Clock, MonotonicClock
from common.errors import KvCorrupt, PeerFailed
from common.ids import PeerId
from kvstore.transport.block_jobs import (
    PIECE_BYTES,
    RUN_BYTES,
    BlockEvent,
    BlockJob,
    BlockJobDone,
    FetchJob,
    LayerFetched,
    Piece,
    StoreJob,
    pieces,
    require_alike,
)
from kvstore.transport.checksums import Checksums, checksums_of, wrong_places
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.load_gate import LoadGate
from kvstore.transport.own_pages import OwnPages


@dataclass(slots=True, eq=False)
class _Attached:
    """One mapping from `attach` to `detach`."""

    pages: MappedPages
    detached: bool = False


@dataclass(slots=True, eq=False)
class _Work:
    """A job on its way, and the mapping that it was posted for: no other one may ever be read or written for it."""

    job: BlockJob
    attached: _Attached | None
    left: Iterator[Piece]
    columns_there: int = 0
    n_bytes: int = 0
    n_copies: int = 0
    elapsed_ms: float = 0.0
    checksums: list[Checksums] = field(default_factory=list)
    """Of the pieces of a store."""
    checked_pages: int = 0
    wrong_peer_pages: tuple[int, ...] = ()


class BlockMover:
    """Owns the mappings to use and two queues: fetches, and stores that wait for them between two of their pieces.

    `on_event` runs in the mover's thread, or in that of the caller of `post`; it must only pass the news on. What is
    told of a load is told before the gate lets anybody read it. All methods are the loop thread's.
    """

    def __init__(
        self,
        own: OwnPages,
        gate: LoadGate,
        on_event: Callable[[BlockEvent], None],
        clock: Clock | None = None,
        *,
        verify: bool = False,
    ) -> None:
        """`verify`: make the checksums of what is stored, and check what is fetched before anybody may use it."""
        self._verify = verify
        self._own, self._gate, self._on_event = own, gate, on_event
        self._clock = clock or MonotonicClock()
        self._page_bytes = own.layout.page_bytes
        self._max_pages = max(1, PIECE_BYTES // self._page_bytes)
        self._layers_at_once = max(1, RUN_BYTES // self._page_bytes)
        self._attached: dict[PeerId, _Attached] = {}
        self._changed = threading.Condition()  # guards what follows
        self._fetches: deque[_Work] = deque()
        self._stores: deque[_Work] = deque()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="block mover", daemon=True)
        self._thread.start()

    def attach(self, peer: PeerId, pages: MappedPages) -> None:
        """Use this mapping for jobs posted from now on; an earlier one is detached. Closing it is the share's.

        Raises PeerFailed if the peer's pages are of another length than ours.
        """
        if pages.description.page_bytes != self._page_bytes:
            raise PeerFailed(f"{peer} has pages of {pages.description.page_bytes} bytes, not {self._page_bytes}")
        self.detach(peer)
        self._attached[peer] = _Attached(pages)

    def detach(self, peer: PeerId) -> None:
        """Use the mapping no more after the piece in progress: its jobs end as failed. Unknown peers are ignored."""
        attached = self._attached.pop(peer, None)
        if attached is not None:
            attached.detached = True

    def post(self, job: BlockJob) -> None:
        """Queue a job for the mapping that its peer has now. After `stop` it ends as failed at once.

        Raises ValueError if the two sides differ in shape, or if a load with this call has not ended.
        """
        require_alike(job)
        work = _Work(job, self._attached.get(job.peer), pieces(job, self._max_pages, self._layers_at_once))
        if isinstance(job, FetchJob):
            self._gate.begin(job.call)
            if job.layers and job.layers[0]:
                self._gate.open(job.call, job.readable_layer(0))
        with self._changed:
            if self._running:
                (self._fetches if isinstance(job, FetchJob) else self._stores).append(work)
                self._changed.notify_all()
                return
        self._end(work, "the block mover has stopped")

    def begin_ring(self, ring: int, free_layer: int) -> None:
        """Let nobody write layers behind `free_layer` of the ring until a StoreJob of it, or `open_ring`, says so.

        Raises ValueError if a load or ring with this call has not ended.
        """
        self._gate.begin(ring)
        self._gate.open(ring, free_layer)

    def open_ring(self, ring: int, free_layer: int | None) -> None:
        """Layers up to `free_layer` may be written; None: all, the ring is over. Unknown rings are ignored."""
        if free_layer is None:
            self._gate.end(ring)
        else:
            self._gate.open(ring, free_layer)

    def stop(self) -> None:
        """End after the piece in progress; all jobs that are left end as failed."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._advance(work)
        finally:  # also when our own bug ends this thread: nobody may wait for a job for ever
            self._abandon()

    def _next(self) -> _Work | None:
        """The job that is due; None if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._fetches or self._stores)
            if not self._running:
                return None
            return self._fetches[0] if self._fetches else self._stores[0]

    def _advance(self, work: _Work) -> None:
        """One piece of a job, or its end."""
        piece = next(work.left, None)
        error_text = ""
        if piece is not None:
            try:
                self._copy(work, piece)
            except PeerFailed as error:
                error_text = str(error)
        if piece is None or error_text:
            self._leave(work)
            self._end(work, error_text)
            return
        if piece is not None and isinstance(work.job, FetchJob):
            self._tell_there(work, work.job, piece)

    def _tell_there(self, work: _Work, job: FetchJob, piece: Piece) -> None:
        for column in piece.columns_there:
            work.columns_there = column + 1
            self._on_event(LayerFetched(job.call, job.layer_of(column), ok=True))
            self._gate.open(job.call, job.readable_layer(column + 1))

    def _copy(self, work: _Work, piece: Piece) -> None:
        job, attached = work.job, work.attached
        if attached is None or attached.detached:
            raise PeerFailed(f"no connection to {job.peer}")
        began_ms = self._clock.now_ms()
        if isinstance(job, FetchJob) and began_ms > job.deadline_ms:
            raise PeerFailed(f"the lease of {job.peer} was over {began_ms - job.deadline_ms:.1f} ms ago")
        copy = self._own.copy_in if isinstance(job, FetchJob) else self._own.copy_out
        n_copies = copy(piece.own_pages, attached.pages, piece.peer_pages)
        ended_ms = self._clock.now_ms()
        work.elapsed_ms += ended_ms - began_ms
        work.n_copies += n_copies
        work.n_bytes += piece.own_pages.size * self._page_bytes
        if isinstance(job, FetchJob) and ended_ms > job.deadline_ms:
            raise PeerFailed(f"a copy from {job.peer} ended {ended_ms - job.deadline_ms:.1f} ms after its lease")
        if self._verify:
            self._check(work, piece)
            work.elapsed_ms += self._clock.now_ms() - ended_ms

    def _check(self, work: _Work, piece: Piece) -> None:
        """Make the checksums of a piece that has left, or compare those of one that has come. Raises KvCorrupt."""
        if isinstance(work.job, StoreJob):
            work.checksums.append(checksums_of(self._own, piece.own_pages))
            return
        if piece.expected is None:
            return
        wrong = wrong_places(piece.expected, checksums_of(self._own, piece.own_pages))
        work.checked_pages += int((piece.expected >= 0).sum())
        if wrong:
            pages = work.wrong_peer_pages = tuple(int(piece.peer_pages[place]) for place in wrong)
            raise KvCorrupt(f"{len(pages)} pages of {work.job.peer} came otherwise than they were kept: {pages[:8]}")

    def _leave(self, work: _Work) -> None:
        with self._changed:
            (self._fetches if isinstance(work.job, FetchJob) else self._stores).popleft()

    def _end(self, work: _Work, error_text: str) -> None:
        """Tell the end of a job, which is in no queue any more; then let everybody through.

        A ring that is over is over before that: who hears of its last copy may load what was copied, under the ring's number.
        """
        job, ok = work.job, not error_text
        if isinstance(job, StoreJob) and job.ring is not None and job.free_layer is None:
            self._gate.end(job.ring)
        try:
            if isinstance(job, FetchJob) and job.by_layer and not ok:
                self._on_event(LayerFetched(job.call, job.layer_of(work.columns_there), ok=False))
            moved_pages, fetched = work.n_bytes // self._page_bytes, isinstance(job, FetchJob) and self._verify
            done = BlockJobDone(
                job.call,
                ok,
                work.n_bytes,
                work.n_copies,
                work.elapsed_ms,
                error_text,
                checksums=tuple(chain.from_iterable(work.checksums)),
                checked_pages=work.checked_pages,
                wrong_pages=len(work.wrong_peer_pages),
                wrong_peer_pages=work.wrong_peer_pages,
                unchecked_pages=moved_pages - work.checked_pages if fetched else 0,
            )
            self._on_event(done)
        finally:
            if isinstance(job, FetchJob):
                self._gate.end(job.call)
            elif job.ring is not None and job.free_layer is not None:
                self._gate.open(job.ring, job.free_layer)

    def _abandon(self) -> None:
        with self._changed:
            self._running = False
            left = [*self._fetches, *self._stores]
            self._fetches.clear()
            self._stores.clear()
        for work in left:
            self._end(work, "the block mover has stopped")
