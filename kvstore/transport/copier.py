"""The thread that moves KV while the engine computes."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common.clock import Clock, MonotonicClock
from common.errors import PeerFailed
from common.ids import PeerId, TransferId
from common.messages.handover import KvSpan
from common.net.sockets import Payload
from kvstore.transport.channel import Channel


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Move one span. The pages on both sides stay what they are until its CopyDone was seen."""

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


@dataclass(frozen=True, slots=True)
class _Close:
    channel: Channel


class Copier:
    """Owns the channels and the queue of jobs; runs them one after the other, in the order they were posted.

    `on_done` runs in the copier's thread, or in that of the caller of `post` and `stop`; it must only pass the news on.
    """

    def __init__(self, on_done: Callable[[CopyDone], None], clock: Clock | None = None) -> None:
        self._on_done = on_done
        self._clock = clock or MonotonicClock()
        self._changed = threading.Condition()
        self._queue: deque[CopyJob | _Close] = deque()
        self._running: CopyJob | None = None
        self._channels: dict[PeerId, Channel] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="copier", daemon=True)
        self._thread.start()

    def attach(self, peer: PeerId, channel: Channel) -> None:
        """Use this channel for jobs to `peer` from now on; an earlier one is closed."""
        self.detach(peer)
        with self._changed:
            self._channels[peer] = channel

    def detach(self, peer: PeerId) -> None:
        """Close the channel to `peer` after the copy in progress; jobs still waiting for it end as failed."""
        with self._changed:
            channel = self._channels.pop(peer, None)
            if channel is not None:
                self._queue.appendleft(_Close(channel))
                self._changed.notify_all()

    def kind(self, peer: PeerId) -> str | None:
        """Kind of the channel to `peer`; None if there is none."""
        with self._changed:
            channel = self._channels.get(peer)
            return None if channel is None else channel.kind

    def post(self, job: CopyJob) -> None:
        """Queue a job. After `stop` it ends as failed at once."""
        with self._changed:
            stopped = self._stopping
            if not stopped:
                self._queue.append(job)
                self._changed.notify_all()
        if stopped:
            self._on_done(CopyDone(job, False, None, "the copier has stopped", 0.0))

    def drain(self, peer: PeerId, timeout_s: float) -> bool:
        """Wait until no job for `peer` is queued or running; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy_with(peer), timeout_s)

    def stop(self) -> None:
        """End after the copy in progress; jobs still waiting end as failed; every channel is closed."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _busy_with(self, peer: PeerId) -> bool:
        waiting = any(isinstance(item, CopyJob) and item.to == peer for item in self._queue)
        return waiting or (self._running is not None and self._running.to == peer)

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                if isinstance(item, _Close):
                    item.channel.close()
                else:
                    self._on_done(self._perform(item))
                    self._finish()
        finally:  # also when our own bug ends this thread: nobody may wait for a job for ever
            self._abandon()

    def _take(self) -> CopyJob | _Close | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if self._stopping:
                return None
            item = self._queue.popleft()
            self._running = item if isinstance(item, CopyJob) else None
            return item

    def _finish(self) -> None:
        with self._changed:
            self._running = None
            self._changed.notify_all()

    def _perform(self, job: CopyJob) -> CopyDone:
        with self._changed:
            channel = self._channels.get(job.to)
        if channel is None:
            return CopyDone(job, False, None, f"no connection to {job.to}", 0.0)
        began_ms = self._clock.now_ms()
        try:
            payload = channel.copy(job.span, job.source_pages, job.target_pages)
        except PeerFailed as error:
            return CopyDone(job, False, None, str(error), self._clock.now_ms() - began_ms)
        return CopyDone(job, True, payload, "", self._clock.now_ms() - began_ms)

    def _abandon(self) -> None:
        with self._changed:
            self._stopping = True
            left = [*([self._running] if self._running else []), *self._queue]
            closing = list(self._channels.values())
            self._queue.clear()
            self._channels.clear()
            self._running = None
            self._changed.notify_all()
        for item in left:
            if isinstance(item, _Close):
                closing.append(item.channel)
            else:
                self._on_done(CopyDone(item, False, None, "the copier has stopped", 0.0))
        for channel in closing:
            channel.close()
