"""Who dialled this worker: gateways and other workers. Pure.

Owns one entry per calling incarnation, made by its first message and removed after `silent_ms` without any; and who was
welcomed as what gives orders, which silence does not end, of each role the latest that were heard.
"""

from common.errors import ProtocolViolation
from common.ids import PeerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.liveness import Hello, Member, Refused, Welcome, difference

_MOST_OF_A_ROLE = 1_024  # a stranger can take a new name for every Hello, and a process that crashes does


class Callers:
    """Greets callers and notices their silence."""

    def __init__(self, mine: Member, *, silent_ms: float) -> None:
        self._mine, self._silent_ms = mine, silent_ms
        self._heard_ms: dict[PeerId, float] = {}
        self._refused: set[PeerId] = set()
        self._roles: dict[PeerId, str] = {}  # of those that were welcomed
        self._orderers: dict[str, dict[PeerId, None]] = {"gateway": {}, "prefill": {}}
        """By role; who was heard longest ago comes first, and goes if there are too many."""

    def heard(self, peer: PeerId, now_ms: float) -> None:
        """Any message came from the peer."""
        self._heard_ms[peer] = now_ms
        for alike in self._orderers.values():
            if peer in alike:
                del alike[peer]
                alike[peer] = None

    def greet(self, peer: PeerId, hello: Hello) -> Send:
        """Welcome, or Refused with the fields in which the caller's model differs from ours."""
        for others in self._orderers.values():
            others.pop(peer, None)
        theirs, mine = hello.member.model, self._mine.model
        rows = difference(mine, theirs) if theirs is not None and mine is not None else ""
        if hello.member.role != "gateway" and rows:
            self._refused.add(peer)
            return Send(peer, Refused(text=f"{hello.member.id} does not fit {self._mine.id}: {rows}"))
        self._roles[peer] = hello.member.role
        if (alike := self._orderers.get(hello.member.role)) is not None:
            alike[peer] = None
            if len(alike) > _MOST_OF_A_ROLE:
                del alike[next(iter(alike))]
        return Send(peer, Welcome(member=self._mine))

    def role(self, peer: PeerId) -> str | None:
        """What the caller said it is; None if it was not heard of late, or was not welcome."""
        return self._roles.get(peer)

    def is_welcome(self, role: str, peer: PeerId) -> bool:
        """Whether the caller was welcomed as a `role` that gives orders here, now or before it fell silent."""
        return peer in self._orderers[role]

    def require_gateway(self, peer: PeerId, order: Message) -> None:
        """Raise ProtocolViolation unless the caller is a gateway."""
        if not self.is_welcome("gateway", peer):
            raise ProtocolViolation(f"{self._mine.id} got {type(order).__name__} from {peer}, which is no gateway")

    def is_refused(self, peer: PeerId) -> bool:
        """Whether the peer's KV must not come here."""
        return peer in self._refused

    def gone_silent(self, now_ms: float) -> list[PeerId]:
        """Callers not heard for too long; they are forgotten with this call."""
        gone = [peer for peer, heard in self._heard_ms.items() if now_ms - heard > self._silent_ms]
        for peer in gone:
            self.forget(peer)
        return gone

    def knows(self, peer: PeerId) -> bool:
        """Whether the caller was heard of late."""
        return peer in self._heard_ms

    @property
    def n_callers(self) -> int:
        """Callers heard of late."""
        return len(self._heard_ms)

    def forget(self, peer: PeerId) -> None:
        """The caller is dead."""
        self._heard_ms.pop(peer, None)
        self._refused.discard(peer)
        self._roles.pop(peer, None)
