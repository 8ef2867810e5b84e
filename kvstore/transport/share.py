"""Page memory shared between processes of one host, and the exact news of their deaths.

A process may be host (others map its pages) and guest (it maps others'). Every connection stays open for life: when it
ends, the other process has died or hung up, and in both cases it has no mapping any more, because a process that hangs
up unmaps first and the kernel unmaps a dying process before it closes its sockets. What a dying process still does on a
device ends a little later: a guest with a device that did not say goodbye is gone when its process is.
"""

import os
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.clock import Clock, MonotonicClock
from common.errors import PeerFailed
from common.ids import PeerId
from common.log import Log
from kvstore.memory.shareable import Shareable
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.guest import ChunkMapper, Visited, visit
from kvstore.transport.host import Guest, Host

_INTRODUCE_WITHIN_MS = 5_000.0
_ADAPT_WITHIN_MS = 5_000.0
_LOOK_AGAIN_S = 0.02
_MOST_STRANGERS = 64
"""Connections that have not said whose they are: each takes a descriptor of a process that has perhaps a thousand."""


@dataclass(eq=False, slots=True)
class _Visit:
    """One mapped peer. Leaves by hanging up, by being replaced, or by the host's end; each unmaps and closes."""

    peer: PeerId
    at: Visited
    watched: bool = True
    """Whether the selector knows the connection."""


class Share:
    """Watches every share connection of this process from one thread.

    `on_joined(peer)`: a guest is about to map our memory. `on_gone(peer)`: it maps our memory no more. `on_lost(peer)`: a
    host whose memory we mapped ended that, and its pages are unmapped here; it may still map ours. All run in the share's thread, in the order things happened, and
    must only pass the news on. Hanging up and closing on this side is no news.
    """

    def __init__(
        self,
        self_id: PeerId,
        *,
        on_joined: Callable[[PeerId], None],
        on_gone: Callable[[PeerId], None],
        on_lost: Callable[[PeerId], None] | None = None,
        on_died: Callable[[BaseException], None] | None = None,
        clock: Clock | None = None,
        mapper: ChunkMapper | None = None,
    ) -> None:
        """`on_lost`: `on_gone` if it is None. `mapper`: how device memory of others is mapped; None: it is not.

        `on_died`: our own bug ended the share's thread, its last word: no more news comes, so the process must end.
        None: that is left to `threading.excepthook`.
        """
        self._self_id, self._on_joined, self._on_gone, self._on_died = self_id, on_joined, on_gone, on_died
        self._on_lost = on_lost or on_gone
        self._log = Log(process=self_id)
        self._clock, self._mapper = clock or MonotonicClock(), mapper
        self._lock = threading.Lock()  # guards _visited, that it agrees with the selector, _settled and _stopping
        self._settled: list[Callable[[], None]] = []  # of changes that the share's thread has not told of yet
        self._visited: dict[PeerId, _Visit] = {}
        self._host: Host | None = None
        self._guests: dict[PeerId, int] = {}  # open connections; the share's thread alone
        self._strangers: dict[Guest, float] = {}  # until when (ms) they may introduce themselves; as above
        self._dying: dict[Guest, None] = {}  # without a goodbye, their processes not gone yet; as above
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="share", daemon=True)
        self._thread.start()

    def serve(self, memory: Shareable, run_dir: Path) -> str:
        """Let others map our pages; returns the socket's path. Raises ConfigError."""
        host = Host.open(self._self_id, memory, run_dir)
        with self._lock:
            self._host = host
            self._selector.register(host.listener, selectors.EVENT_READ, host)
        os.eventfd_write(self._wake_fd, 1)
        return os.fspath(host.path)

    def resized(self, on_settled: Callable[[], None]) -> None:
        """The memory that we serve has changed: tell every guest what it is now.

        `on_settled` runs in the share's thread when all of them map exactly that, or have died, or were hung up on
        because they did not answer in time. After growing, hand out new pages only then: who was hung up on refuses
        them anyway. What was shrunk is back at the system then, but for a guest that hangs, which keeps it until it
        ends. After `close` it never runs.
        """
        with self._lock:
            self._settled.append(on_settled)
        os.eventfd_write(self._wake_fd, 1)

    def connect(self, peer: PeerId, path: str) -> MappedPages:
        """Map a peer's pages and prove that both see the same memory; takes milliseconds. Raises PeerFailed.

        An earlier mapping of that peer is unmapped, also one that came about meanwhile.
        """
        self.hang_up(peer)
        visited = visit(self._self_id, peer, path, self._mapper)
        visited.connection.setblocking(False)
        new = _Visit(peer, visited)
        with self._lock:
            replaced, stopping = self._visited.get(peer), self._stopping
            if replaced is not None:
                self._forget(replaced)
            if not stopping:
                self._visited[peer] = new
                self._selector.register(visited.connection, selectors.EVENT_READ, new)
                os.eventfd_write(self._wake_fd, 1)
        if replaced is not None:
            replaced.at.close()
        if stopping:
            visited.close()
            raise PeerFailed(f"this process is closing and maps nothing of {peer} any more")
        return visited.pages

    def hang_up(self, peer: PeerId, pages: MappedPages | None = None) -> None:
        """Unmap a peer's pages, after the copy in progress, and end the connection. Unknown peers are ignored.

        `pages`: only if it is these that are mapped still, and not others that replaced them.
        """
        with self._lock:
            visited = self._visited.get(peer)
            if visited is None or (pages is not None and visited.at.pages is not pages):
                return
            self._forget(visited)
        visited.at.close()

    def _forget(self, visited: _Visit) -> None:
        """Watch a visit no more; under the lock. The caller closes it."""
        if self._visited.get(visited.peer) is visited:
            del self._visited[visited.peer]
        if visited.watched:
            visited.watched = False
            self._selector.unregister(visited.at.connection)

    def close(self) -> None:
        """Stop serving, hang up everywhere, end the thread. Guests learn of it by end of file. Once is enough."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for peer in list(self._visited):
            self.hang_up(peer)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Guest):
                key.data.close()
        if self._host is not None:
            self._host.close()
        self._selector.close()
        os.close(self._wake_fd)

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:
            if self._on_died is None:
                raise
            self._on_died(error)

    def _watch(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._patience_s()):
                match key.data:
                    case None:
                        os.eventfd_read(self._wake_fd)
                    case Host() as host:
                        self._accept(host)
                    case Guest() as guest if guest not in self._dying:
                        self._hear(guest)
                    case _Visit() as visited:
                        self._hear_host(visited)
            self._tell_changes()
            self._end_strangers()
            self._end_dying()

    def _patience_s(self) -> float | None:
        """How long the next stranger, or guest that must adapt, may still be silent; None without any."""
        settle_ms = None if self._host is None else self._host.settle_by_ms()
        until_ms = min([*self._strangers.values(), *([] if settle_ms is None else [settle_ms])], default=None)
        waits_s = [] if until_ms is None else [max(0.0, until_ms - self._clock.now_ms()) / 1000]
        waits_s += [_LOOK_AGAIN_S for guest in self._dying if guest.process is not None and guest.process.fd is None]
        return min(waits_s, default=None)

    def _tell_changes(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        now_ms = self._clock.now_ms()
        for on_settled in settled:
            if self._host is not None:
                self._host.changed(on_settled, now_ms + _ADAPT_WITHIN_MS)
            else:
                on_settled()  # nobody maps anything
        if self._host is not None:
            self._host.settle(now_ms)

    def _end_strangers(self) -> None:
        now_ms = self._clock.now_ms()
        too_many = len(self._strangers) - _MOST_STRANGERS  # the eldest go
        for place, (guest, until_ms) in enumerate(list(self._strangers.items())):
            if place < too_many or now_ms >= until_ms:
                self._guest_ended(guest)

    def _accept(self, host: Host) -> None:
        guest = host.accept()
        if guest is not None:
            self._strangers[guest] = self._clock.now_ms() + _INTRODUCE_WITHIN_MS
            with self._lock:
                self._selector.register(guest.connection, selectors.EVENT_READ, guest)

    def _hear(self, guest: Guest) -> None:
        host, known = self._host, guest.peer is not None
        assert host is not None, "a guest without a host"
        try:
            alive = host.hear(guest)
        except PeerFailed as error:
            alive = False  # it broke the rules or left: its connection ends, which it notices
            host.hear_last(guest)
            if not guest.left:
                self._log.event("guest_failed", guest=guest.peer, text=str(error))
        if not known and guest.peer is not None:
            del self._strangers[guest]
            self._guests[guest.peer] = self._guests.get(guest.peer, 0) + 1
            self._on_joined(guest.peer)
        if not alive:
            self._guest_ended(guest)

    def _guest_ended(self, guest: Guest) -> None:
        with self._lock:
            self._selector.unregister(guest.connection)
        guest.connection.close()
        self._strangers.pop(guest, None)
        if not guest.may_write_still:
            self._farewell(guest)
            return
        self._dying[guest] = None
        if guest.process is not None and guest.process.fd is not None:
            with self._lock:
                self._selector.register(guest.process.fd, selectors.EVENT_READ, guest)

    def _end_dying(self) -> None:
        """Processes that are gone, with whatever they still did on a device."""
        for guest in [guest for guest in self._dying if not guest.may_write_still]:
            del self._dying[guest]
            if guest.process is not None and guest.process.fd is not None:
                with self._lock:
                    self._selector.unregister(guest.process.fd)
            self._farewell(guest)

    def _farewell(self, guest: Guest) -> None:
        """It maps nothing of ours any more."""
        guest.close()
        if self._host is not None:
            self._host.forget(guest)
        if guest.peer is None:
            return
        self._guests[guest.peer] -= 1
        if self._guests[guest.peer] == 0:
            del self._guests[guest.peer]
            self._on_gone(guest.peer)

    def _hear_host(self, visited: _Visit) -> None:
        with self._lock:
            if not visited.watched:
                return  # hung up by this process meanwhile
        try:
            if visited.at.hear():
                return
        except PeerFailed as error:  # it broke the rules, or we cannot follow it: its memory is of no more use
            self._log.event("host_failed", host=visited.peer, text=str(error))
        with self._lock:
            if not visited.watched:
                return
            self._forget(visited)
        visited.at.close()
        self._on_lost(visited.peer)
