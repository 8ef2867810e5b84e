"""The loop of a KV store: hear, decide, act. One thread owns index, memory and sockets."""

from collections.abc import Callable, Sequence

from common.errors import ProtocolViolation
from common.ids import PeerId
from common.log import Log
from common.messages import AnyMessage
from common.net.sockets import Exchange, Payload
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.store import KvStoreCore, Reply, Write

_WAIT_MS = 200.0


class KvStoreService:
    """Runs a core over real sockets and memory; owns neither, its maker closes both."""

    def __init__(self, core: KvStoreCore, exchange: Exchange, memory: BlockMemory, log: Log) -> None:
        self._core, self._exchange, self._memory, self._log = core, exchange, memory, log

    def serve(self, stopping: Callable[[], bool]) -> None:
        """Answer messages until `stopping()`."""
        while not stopping():
            received = self._exchange.receive(_WAIT_MS)
            for peer, message, payloads in received:
                self._hear(peer, message, payloads)
            if not received:
                self._core.check()

    def _hear(self, peer: PeerId, message: AnyMessage, payloads: Sequence[Payload]) -> None:
        try:
            actions = self._core.on_message(peer, message, [len(payload) for payload in payloads])
        except ProtocolViolation as error:  # the peer's fault: say so, keep serving the others
            self._log.event("protocol_violation", peer=peer, text=str(error))
            return
        for action in actions:
            match action:
                case Write(slot, frame):
                    self._memory.write(slot, payloads[frame])
                case Reply(to, answer, slots):
                    frames = [self._memory.read(slot, self._core.block_bytes or 0) for slot in slots]
                    if not self._exchange.send(to, answer, frames):
                        self._log.event("send_refused", peer=to, message=type(answer).__name__)
