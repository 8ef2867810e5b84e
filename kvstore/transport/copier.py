"""The thread that moves KV while the engine computes."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from common.clock import Clock, MonotonicClock
from common.errors import PeerFailed
from common.ids import PeerId, TransferId
from common.messages.handover import KvSpan
from common.net.sockets import Payload
from kvstore.transport.channel import Channel
from kvstore.transport.checksums import Checksums, checksums_of
from kvstore.transport.own_pages import OwnPages


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Move one span, pages in its order: block by block. The pages on both sides stay what they are until its CopyDone was seen."""

    transfer: TransferId
    to: PeerId
    span: KvSpan
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyDone:
    """The end of one job, good or bad: every posted job has exactly one."""

    job: CopyJob
    ok: bool
    payload: Payload | None
    """tcp: what must travel with KvSent."""
    error_text: str
    elapsed_ms: float
    """Of the copy alone; 0 if it never began."""
    n_copies: int = 0
    """Contiguous pieces that were moved; 0 if it failed, as `n_bytes`."""
    n_bytes: int = 0
    checksums: Checksums = ()
    """Of the source pages, in the span's order; empty if none are made, or it failed."""


@dataclass(slots=True)
class _Attached:
    """One channel from `attach` to `detach`."""

    channel: Channel
    detached: bool = False


@dataclass(frozen=True, slots=True)
class _Posted:
    """A job and the channel that it was posted for: no other one may ever write into its pages."""

    job: CopyJob
    attached: _Attached | None


@dataclass(frozen=True, slots=True)
class _Close:
    channel: Channel


@dataclass(frozen=True, slots=True)
class _Reached:
    """Marks a place in the queue; set when everything before it has ended."""

    reached: threading.Event


_Item = _Posted | _Close | _Reached | None


class Copier:
    """Owns the channels and the queue of jobs; runs them one after the other, in the order they were posted.

    `on_done` runs in the copier's thread, or in that of the caller of `post` and `stop`; it must only pass the news on.
    All methods are the loop thread's.
    """

    def __init__(
        self, on_done: Callable[[CopyDone], None], clock: Clock | None = None, *, verify: OwnPages | None = None
    ) -> None:
        """`verify`: our pages, for this thread, of which checksums are made; None: none are made."""
        self._verify = verify
        self._on_done = on_done
        self._clock = clock or MonotonicClock()
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._attached: dict[PeerId, _Attached] = {}
        self._ending = threading.Lock()  # makes "still running?" and queueing one step
        self._running = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="copier", daemon=True)
        self._thread.start()

    def attach(self, peer: PeerId, channel: Channel) -> None:
        """Use this channel for jobs to `peer` posted from now on; an earlier one is detached."""
        self.detach(peer)
        self._attached[peer] = _Attached(channel)

    def detach(self, peer: PeerId) -> None:
        """Close the channel to `peer` after the copy in progress; jobs still waiting for it end as failed."""
        attached = self._attached.pop(peer, None)
        if attached is None:
            return
        attached.detached = True
        if not self._put(_Close(attached.channel)):
            attached.channel.close()

    def kind(self, peer: PeerId) -> str | None:
        """Kind of the channel to `peer`; None if there is none."""
        attached = self._attached.get(peer)
        return None if attached is None else attached.channel.kind

    def post(self, job: CopyJob) -> None:
        """Queue a job for the channel that its peer has now. After `stop` it ends as failed at once."""
        attached = self._attached.get(job.to)
        if attached is not None:
            attached.channel.posted(job.span)
        if not self._put(_Posted(job, attached)):
            self._on_done(_never(job))

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything posted so far has ended; False if that took longer."""
        mark = _Reached(threading.Event())
        return not self._put(mark) or mark.reached.wait(timeout_s)

    def stop(self) -> None:
        """End after the copy in progress; jobs still waiting end as failed; every channel is closed."""
        self._stopping = True
        self._put(None)
        self._thread.join()

    def _put(self, item: _Item) -> bool:
        with self._ending:
            if self._running:
                self._queue.put(item)
            return self._running

    def _run(self) -> None:
        item: _Item = None
        try:
            while (item := self._queue.get()) is not None and not self._stopping:
                match item:
                    case _Posted():
                        done = self._perform(item.job, item.attached)
                        item = None  # its end is told once, also if telling fails
                        self._on_done(done)
                    case _:
                        self._pass_by(item)
        finally:  # also when our own bug ends this thread: nobody may wait for a job for ever
            self._abandon(item)

    def _perform(self, job: CopyJob, attached: _Attached | None) -> CopyDone:
        if attached is None or attached.detached:
            return CopyDone(job, False, None, f"no connection to {job.to}", 0.0)
        began_ms = self._clock.now_ms()
        try:
            moved = attached.channel.copy(job.span, job.source_pages, job.target_pages)
            # Of our pages and not of what was written: then a copy of wrong pages shows too.
            sums = () if self._verify is None else checksums_of(self._verify, job.source_pages)
        except PeerFailed as error:
            return CopyDone(job, False, None, str(error), self._clock.now_ms() - began_ms)
        elapsed_ms = self._clock.now_ms() - began_ms
        return CopyDone(job, True, moved.payload, "", elapsed_ms, moved.n_copies, moved.n_bytes, sums)

    def _pass_by(self, item: _Posted | _Close | _Reached) -> None:
        """What becomes of an item that is not copied."""
        match item:
            case _Posted(job=job):
                self._on_done(_never(job))
            case _Close(channel=channel):
                channel.close()
            case _Reached(reached=reached):
                reached.set()

    def _abandon(self, begun: _Item) -> None:
        with self._ending:
            self._running = False
        left = [begun]
        while not self._queue.empty():
            left.append(self._queue.get())
        for item in left:
            if item is not None:
                self._pass_by(item)
        for peer in list(self._attached):
            self._attached.pop(peer).channel.close()


def _never(job: CopyJob) -> CopyDone:
    return CopyDone(job, False, None, "the copier has stopped", 0.0)
