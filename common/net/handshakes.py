"""Who may speak to a process, and why somebody could not: CURVE keys, ZAP answers and handshake events of its sockets.

With a cluster key every connection is encrypted, and only who proves that it has the same key is heard (ZAP, RFC 27). Without
one, nothing is checked. Either way a handshake that fails is told on both sides, instead of a silence that nobody can read.
"""

import itertools
import struct
import time

import zmq
from zmq.utils import z85

from common.net.cluster_key import ClusterKey
from common.net.violations import Violations

_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_ZAP = "inproc://zeromq.zap.01"
_LOOK_EVERY_S = 0.2
_MOST_PER_LOOK = 1000  # events told in one turn, so that a flood of connections cannot hold the loop
_WHO_DIALLED = "who dialled this process"
_EVENT = struct.Struct("=Hi")
_HANDSHAKE_MS = 5_000
Socket = zmq.Socket[bytes]


class Handshakes:
    """Belongs to an Exchange, and to its thread."""

    def __init__(self, context: "zmq.Context[Socket]", key: ClusterKey | None, refused: Violations) -> None:
        self._context, self._key, self._refused = context, key, refused
        self._monitors: dict[Socket, tuple[Socket, str]] = {}
        self._looked_s, self._numbers = 0.0, itertools.count(1)
        self.asked: Socket | None = None
        """Where ZAP requests come in, to be polled; None: nobody is asked."""

    def prepare_to_listen(self, socket: Socket) -> None:
        """Before `socket` binds."""
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._watch(socket, _WHO_DIALLED)
        if self._key is None:
            return
        self.asked = self._context.socket(zmq.REP)
        self.asked.setsockopt(zmq.LINGER, 0)
        self.asked.bind(_ZAP)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"penstock")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else libzmq lets everybody in when there is nobody to ask
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret)

    def prepare_to_dial(self, socket: Socket, peer: str) -> None:
        """Before `socket` connects."""
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._watch(socket, peer)
        if self._key is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._key.public)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._key.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret)

    def _watch(self, socket: Socket, peer: str) -> None:
        address = f"inproc://handshakes.{next(self._numbers)}"
        socket.monitor(address, _FAILURES)
        monitor = self._context.socket(zmq.PAIR)
        # No limit: libzmq's I/O thread waits for room in this queue, and with it all traffic and the socket's end. Nobody
        # reads while a worker loads its model.
        monitor.setsockopt(zmq.RCVHWM, 0)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.connect(address)
        self._monitors[socket] = monitor, peer

    def forget(self, socket: Socket) -> None:
        """Before `socket` closes."""
        monitor, _ = self._monitors.pop(socket)
        socket.disable_monitor()
        monitor.close(linger=0)

    def close(self) -> None:
        """When every watched socket is closed."""
        if self.asked is not None:
            self.asked.close(linger=0)
            self.asked = None

    def answer(self) -> None:
        """Let in who proved to have the cluster's key, and nobody else."""
        while self.asked is not None and self._key is not None:
            try:
                frames = self.asked.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            # version, request id, domain, address, identity, mechanism, credentials: libzmq itself writes them
            ok = frames[5:6] == [b"CURVE"] and frames[6:] == [z85.decode(self._key.public)]
            status, text = (b"200", b"OK") if ok else (b"400", b"no process of this cluster")
            self.asked.send_multipart([b"1.0", frames[1], status, text, b"", b""])

    def look(self) -> None:
        """Tell of handshakes that failed; cheap enough for every turn of a loop."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        left = _MOST_PER_LOOK
        for monitor, peer in self._monitors.values():
            while left and monitor.poll(0):
                frames: list[bytes] = monitor.recv_multipart()
                event, detail = _EVENT.unpack(frames[0])
                why = self._reason(event, detail, dialled_us=peer == _WHO_DIALLED)
                self._refused.note(peer, f"no connection over {frames[1].decode(errors='replace')}: {why}")
                left -= 1
        if left:  # else there may be more: the next turn goes on
            self._looked_s = now_s

    def _reason(self, event: int, detail: int, *, dialled_us: bool) -> str:
        mine = "this process has none" if self._key is None else "this process has one"
        rule = f"--cluster-key must name the same secret everywhere, and {mine}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            if dialled_us:  # which of the two it was cannot be told: a probe's end comes as a reset or as a close
                return "it closed before it had said who it is, as a probe does; a process of Penstock logs why"
            return (
                f"it hung up during the handshake; its log says why, such as that it has another --cluster-key ({mine})"
            )
        if detail == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return f"one of the two has a cluster key and the other has not; {rule}"
        if detail == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return f"it has another cluster key; {rule}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it did not prove that it has this cluster's key, or was not let in by the other side"
        return f"it broke the protocol of ZeroMQ (event {event:#x}, {detail:#x})"
