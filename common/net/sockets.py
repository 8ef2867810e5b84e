"""The only place that makes ZeroMQ sockets.

An `Exchange` is one process's mailbox: a ROUTER that others dial and a DEALER per process that this one dials.
The listening side binds, the dialling side names itself by its PeerId, and each side answers on the connection the
other opened. Two that dialled each other have one per direction: each sends on its own, so messages keep their order.

With a cluster key all of it is encrypted, and only who has the same key is heard. What no process of ours would send is
bounded here: frames of more than MAX_FRAME_BYTES end their connection, messages of more than MAX_FRAMES frames are dropped.
"""

import os
import threading
from collections.abc import Sequence
from typing import cast

import zmq

from common.errors import ConfigError, ProtocolViolation
from common.ids import PeerId
from common.log import Log
from common.messages import AnyMessage, decode, encode
from common.messages.base import Message
from common.net.cluster_key import ClusterKey
from common.net.handshakes import Handshakes
from common.net.violations import Violations

Payload = bytes | bytearray | memoryview
Received = tuple[PeerId, AnyMessage, list[Payload]]
"""Sender, message, payload frames that followed it."""

MAX_FRAME_BYTES = 2**30
"""One layer's KV of a prompt of 128 Ki tokens, at 8 KiB for a token."""
MAX_FRAMES = 65_536
"""A KvSent has a payload for each of its spans, a Found one for each block."""
_NAMELESS = b"\0"  # how names begin that ZeroMQ gives by itself
_RECONNECT_MS = 500
"""At most twice this passes until a connection that has ended is tried again, a refused handshake too. Always the same: if
libzmq doubled it while nobody listens, a break of 1.6 s would last longer than the 3 s of silence that are death."""
_MAX_PER_SOCKET = 256  # messages taken from one socket per round, so that one peer cannot starve the rest


class Exchange:
    """All ZeroMQ traffic of one process. One thread uses it; only `wake` may be called from others.

    Overflow: past `queue_limit` messages per peer, `send` returns False and the caller decides; nothing is dropped
    in silence. A frame that does not parse is counted in `bad_frames` and skipped. So is, in `stale_messages`, what is left
    of a connection that its peer has replaced by a new one: a process that was stopped finds it when it goes on, ZeroMQ has
    taken the peer's name from it, nobody can be answered, and whoever said it has given it up.
    """

    def __init__(
        self,
        self_id: PeerId,
        bind: str | None,
        *,
        queue_limit: int = 100_000,
        key: ClusterKey | None = None,
        log: Log | None = None,
    ) -> None:
        """`bind`: address to listen on; port 0 or `*` picks a free one; None: only dial. `log`: told of frames that do not
        parse and of connections that do not come about. Raises ConfigError."""
        self._context = zmq.Context()
        self._unparsed, self._refused = Violations("bad_frame", log), Violations("connection_refused", log)
        self._handshakes = Handshakes(self._context, key, self._refused)
        self._self_id = self_id
        self._queue_limit = queue_limit
        self._dialled: dict[PeerId, zmq.Socket[bytes]] = {}
        self._peer_of: dict[object, PeerId] = {}
        self._poller = zmq.Poller()
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._router: zmq.Socket[bytes] | None = None
        self.endpoint = ""
        self.stale_messages = 0
        """Messages of connections that a newer one of the same peer has replaced."""
        if bind is not None:
            self._listen(bind)

    def _listen(self, bind: str) -> None:
        router = self._make(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown peer is an error, not a hole
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects replaces its old connection
        self._handshakes.prepare_to_listen(router)
        if (asked := self._handshakes.asked) is not None:
            self._poller.register(asked, zmq.POLLIN)
        try:
            router.bind(bind.removesuffix(":0") + ":*" if bind.endswith(":0") else bind)
        except zmq.ZMQError as error:
            self._handshakes.forget(router)
            router.close(linger=0)
            self.close()
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        self.endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._router = router
        self._poller.register(router, zmq.POLLIN)

    def _make(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        # Most options are read when the socket binds or connects: set first, bind last.
        socket.setsockopt(zmq.SNDHWM, self._queue_limit)
        socket.setsockopt(zmq.RCVHWM, self._queue_limit)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.LINGER, 200)  # ms
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        return socket

    def dial(self, peer: PeerId, endpoint: str) -> None:
        """Open a connection to `peer`; a second call for the same peer changes nothing.

        Raises ProtocolViolation if `endpoint`, which the peer announced, is no ZeroMQ address.
        """
        if peer in self._dialled:
            return
        socket = self._make(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._self_id.encode())
        self._handshakes.prepare_to_dial(socket, peer)
        try:
            socket.connect(endpoint)
        except (zmq.ZMQError, ValueError, TypeError) as error:  # the last two: no text that an address could be
            self._handshakes.forget(socket)
            socket.close(linger=0)
            raise ProtocolViolation(f"{peer} announces {endpoint!r}, which cannot be dialled: {error}") from error
        self._dialled[peer] = socket
        self._peer_of[socket] = peer
        self._poller.register(socket, zmq.POLLIN)

    def hang_up(self, peer: PeerId) -> None:
        """Close the connection this process opened to `peer`; unknown peers are ignored."""
        socket = self._dialled.pop(peer, None)
        if socket is not None:
            self._poller.unregister(socket)
            del self._peer_of[socket]
            self._handshakes.forget(socket)
            socket.close(linger=0)

    def send(self, peer: PeerId, message: Message, payloads: Sequence[Payload] = ()) -> bool:
        """Queue a message; False if the peer is unknown, gone, or has too many messages waiting.

        After False the peer never hears it: libzmq looks whether there is a connection with room before it takes the first
        frame. True promises nothing: what waits is lost with its connection.
        """
        return self._send_frames(peer, [encode(message), *payloads])

    def _send_frames(self, peer: PeerId, frames: Sequence[Payload]) -> bool:
        dealer = self._dialled.get(peer)
        try:
            if dealer is not None:
                dealer.send_multipart(frames, flags=zmq.NOBLOCK)
            elif self._router is not None:
                self._router.send_multipart([peer.encode(), *frames], flags=zmq.NOBLOCK)
            else:
                return False
        except zmq.ZMQError:
            return False
        return True

    def receive(self, wait_ms: float) -> list[Received]:
        """Everything that has arrived; waits up to `wait_ms` (None of it if woken) for the first message."""
        ready = dict(self._poller.poll(max(0, round(wait_ms))))
        if ready.pop(self._wake_fd, 0):
            os.eventfd_read(self._wake_fd)
        if ready.pop(self._handshakes.asked, 0):
            self._handshakes.answer()
        self._handshakes.look()
        received: list[Received] = []
        for socket in ready:
            for _ in range(_MAX_PER_SOCKET):
                try:
                    frames = socket.recv_multipart(flags=zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._parse(socket, frames, received)
        return received

    def _parse(self, socket: object, frames: list[bytes], received: list[Received]) -> None:
        if socket is self._router:
            sender, *frames = frames
            if sender.startswith(_NAMELESS):
                self.stale_messages += 1
                return
            peer = PeerId(sender.decode(errors="replace"))
        else:
            peer = self._peer_of[socket]
        try:
            if not 1 <= len(frames) <= MAX_FRAMES:
                raise ProtocolViolation(f"{len(frames)} frames; a message has 1 to {MAX_FRAMES}")
            received.append((peer, decode(frames[0]), list(frames[1:])))
        except ProtocolViolation as error:
            self.note_unparsed(peer, str(error))

    def note_unparsed(self, peer: str, text: str) -> None:
        """Count a frame that nobody can read."""
        self._unparsed.note(peer, text)

    @property
    def bad_frames(self) -> int:
        """Messages that did not parse."""
        return self._unparsed.total

    @property
    def refused_connections(self) -> int:
        """Handshakes that failed, of others with this process and of this process with others."""
        return self._refused.total

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "bad_frames_total": float(self.bad_frames),
            "refused_connections_total": float(self.refused_connections),
            "stale_messages_total": float(self.stale_messages),
        }

    def gauges(self) -> dict[str, float]:
        """Present values for reports."""
        return {}

    def dialled_fd(self, peer: PeerId) -> int:
        """File descriptor of the connection to `peer`, for shells that poll elsewhere.

        It becomes readable when something may have arrived, and only once: after it, and after every `send`, call
        `receive(0)` until that returns nothing. Valid until `hang_up`.
        """
        return cast(int, self._dialled[peer].getsockopt(zmq.FD))

    def wake(self) -> None:
        """Make a waiting `receive` return. Any thread, also one that outlives this exchange: then nothing happens."""
        with self._wake_lock:  # a closed descriptor's number may be another file's by now
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close every socket and the context; waits at most the linger time."""
        for peer in list(self._dialled):
            self.hang_up(peer)
        if self._router is not None:
            self._handshakes.forget(self._router)
            self._router.close()
            self._router = None
        self._handshakes.close()
        closer = threading.Thread(target=self._context.term, daemon=True)
        closer.start()
        closer.join(timeout=2.0)
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1
