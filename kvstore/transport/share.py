"""Page memory shared between processes of one host, and the exact news of their deaths.

A process may be host (others map its pages) and guest (it maps others'). Every connection stays open for life: when it
ends, the other process has died or hung up, and in both cases it has no mapping any more, because a process that hangs
up unmaps first and the kernel unmaps a dying process before it closes its sockets.
"""

import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.memory.host import HostMemory
from kvstore.transport.guest import visit
from kvstore.transport.host import Guest, Host
from kvstore.transport.shared_pages import SharedPages


class Share:
    """Watches every share connection of this process from one thread.

    `on_joined(peer)`: a guest is about to map our memory. `on_gone(peer)`: the last connection with that process ended;
    if it was a host, its pages are unmapped here. Both run in the share's thread, in the order things happened, and
    must only pass the news on. Hanging up and closing on this side is no news.
    """

    def __init__(
        self, self_id: PeerId, *, on_joined: Callable[[PeerId], None], on_gone: Callable[[PeerId], None]
    ) -> None:
        self._self_id, self._on_joined, self._on_gone = self_id, on_joined, on_gone
        self._lock = threading.Lock()  # guards _visited, and that it agrees with the selector
        self._visited: dict[PeerId, tuple[socket.socket, SharedPages]] = {}
        self._host: Host | None = None
        self._guests: dict[PeerId, int] = {}  # open connections; the share's thread alone
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="share", daemon=True)
        self._thread.start()

    def serve(self, memory: HostMemory, run_dir: Path) -> str:
        """Let others map our pages; returns the socket's path. Raises ConfigError."""
        host = Host.open(self._self_id, memory, run_dir)
        with self._lock:
            self._host = host
            self._selector.register(host.listener, selectors.EVENT_READ, host)
        self._wake()
        return os.fspath(host.path)

    def connect(self, peer: PeerId, path: str) -> SharedPages:
        """Map a peer's pages and prove that both see the same memory; takes milliseconds. Raises PeerFailed."""
        self.hang_up(peer)
        connection, pages = visit(self._self_id, peer, path)
        connection.setblocking(False)
        with self._lock:
            self._visited[peer] = (connection, pages)
            self._selector.register(connection, selectors.EVENT_READ, peer)
        self._wake()
        return pages

    def hang_up(self, peer: PeerId) -> None:
        """Unmap a peer's pages, after the copy in progress, and end the connection. Unknown peers are ignored."""
        with self._lock:
            visited = self._visited.pop(peer, None)
            if visited is not None:
                self._selector.unregister(visited[0])
        if visited is not None:
            visited[1].close()  # first unmap, then let the host know
            visited[0].close()

    def close(self) -> None:
        """Stop serving, hang up everywhere, end the thread. Guests learn of it by end of file. Once is enough."""
        if self._stopping:
            return
        self._stopping = True
        self._wake()
        self._thread.join()
        for peer in list(self._visited):
            self.hang_up(peer)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Guest):
                key.data.connection.close()
        if self._host is not None:
            self._host.close()
        self._selector.close()
        os.close(self._wake_fd)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                match key.data:
                    case None:
                        os.eventfd_read(self._wake_fd)
                    case Host() as host:
                        self._accept(host)
                    case Guest() as guest:
                        self._hear(guest)
                    case peer:
                        self._hear_host(PeerId(peer), key.fileobj)

    def _accept(self, host: Host) -> None:
        guest = host.accept()
        if guest is not None:
            with self._lock:
                self._selector.register(guest.connection, selectors.EVENT_READ, guest)

    def _hear(self, guest: Guest) -> None:
        host, known = self._host, guest.peer is not None
        assert host is not None, "a guest without a host"
        try:
            alive = host.hear(guest)
        except PeerFailed:
            alive = False  # it broke the rules or left: its connection ends, which it notices
        if not known and guest.peer is not None:
            self._guests[guest.peer] = self._guests.get(guest.peer, 0) + 1
            self._on_joined(guest.peer)
        if not alive:
            self._guest_ended(guest)

    def _guest_ended(self, guest: Guest) -> None:
        with self._lock:
            self._selector.unregister(guest.connection)
        guest.connection.close()
        if guest.peer is None:
            return
        self._guests[guest.peer] -= 1
        if self._guests[guest.peer] == 0:
            del self._guests[guest.peer]
            self._on_gone(guest.peer)

    def _hear_host(self, peer: PeerId, connection: object) -> None:
        with self._lock:
            visited = self._visited.get(peer)
            if visited is None or visited[0] is not connection or not _at_end(visited[0]):
                return  # hung up by this process meanwhile, or only chatter
            del self._visited[peer]
            self._selector.unregister(visited[0])
        visited[1].close()
        visited[0].close()
        self._on_gone(peer)


def _at_end(connection: socket.socket) -> bool:
    try:
        return not connection.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a reset is an end as well
