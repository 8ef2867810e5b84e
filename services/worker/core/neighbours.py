"""The processes that a worker keeps connections to: those whose memory it writes or reads. Pure.

Whoever reads or writes dials: prefill workers dial decode workers, to hand KV over; prefill workers dial each other and
mixed workers dial each other, to fetch KV that they lack; all dial KV stores. Two that read each other have two
connections, one per direction, each with its own pings, mapping and end. Decode workers do not dial prefill workers: a
mapping that ends is news of a death, and must not end hand-overs; what they fetch comes by message, over the connection
that the prefill worker opened.

Owns one `_Neighbour` per incarnation of such a process seen in the membership. An entry leaves when its incarnation is
replaced by a newer one in the membership, when it was silent too long, or when the kernel reported the end of a mapping;
it comes back if the membership still lists it.

    DIALLED --Welcome--> PROBING --on_channel--> READY        DIALLED --Refused--> REFUSED
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from common.ids import PeerId, WorkerId, peer_id
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import SHARED_KINDS, Hello, Member, Ping, Refused, Report, TransportReport, Welcome
from services.worker.core.actions import Action, OpenChannel

PING_MS = 500.0


class Link(Enum):
    """How far a connection has come."""

    DIALLED = auto()
    PROBING = auto()
    READY = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class BlockLink:
    """The way to blocks of another process."""

    peer: PeerId
    shared: bool
    """Its memory is mapped here; otherwise bytes travel with messages."""
    block_bytes: int
    is_store: bool = True
    """A KV store; else another worker, with its device pool."""
    probed_bytes_per_s: float = 0.0
    """When the channel was opened; 0: unknown."""


@dataclass(slots=True)
class _Neighbour:
    member: Member
    peer: PeerId
    heard_ms: float
    link: Link = Link.DIALLED
    refusal: str = ""
    transport: TransportReport | None = None
    pinged_ms: float = field(default=float("-inf"))


class Neighbours:
    """Connections to other processes: dialling, greeting, probing, listening for silence."""

    def __init__(self, mine: Member, roles: Collection[str], *, silent_ms: float, block_bytes: int = 0) -> None:
        """`roles`: whom to dial. `block_bytes`: of one token block over all layers."""
        self._mine, self._roles, self._silent_ms, self.block_bytes = mine, frozenset(roles), silent_ms, block_bytes
        self._by_peer: dict[PeerId, _Neighbour] = {}
        self._pings = 0

    def on_members(self, members: list[Member], now_ms: float) -> tuple[list[Action], list[PeerId]]:
        """Dial who is new. Second result: peers of which a newer incarnation has taken the name."""
        actions: list[Action] = []
        others = [m for m in members if m.role in self._roles and m.id != self._mine.id]
        listed = {peer_id(m.id, m.incarnation): m for m in others}
        names = {m.id: peer for peer, m in listed.items()}
        replaced = [p for p, n in self._by_peer.items() if p not in listed and n.member.id in names]
        for peer, member in listed.items():
            if peer not in self._by_peer:
                self._by_peer[peer] = _Neighbour(member, peer, heard_ms=now_ms)
                actions += [Dial(peer, member.endpoint), Send(peer, Hello(member=self._mine))]
        return actions, replaced

    def on_message(self, peer: PeerId, message: Welcome | Refused | Report, now_ms: float) -> list[Action]:
        """Greetings and reports. A Report after a lost Welcome counts as one."""
        neighbour = self._by_peer.get(peer)
        if neighbour is None:
            return []
        neighbour.heard_ms = now_ms
        if isinstance(message, Refused):
            neighbour.link, neighbour.refusal = Link.REFUSED, message.text
            return []
        if isinstance(message, Welcome) and neighbour.link is Link.DIALLED:
            neighbour.link = Link.PROBING
            return [OpenChannel(peer, neighbour.member)]
        return []

    def on_channel(self, report: TransportReport) -> None:
        """The probe found a way to move KV."""
        neighbour = self._by_peer.get(report.peer)
        if neighbour is not None:
            neighbour.link, neighbour.transport = Link.READY, report

    def on_channel_failed(self, peer: PeerId, text: str) -> None:
        """No allowed way to the peer works; it stays refused until one of the two restarts."""
        neighbour = self._by_peer.get(peer)
        if neighbour is not None:
            neighbour.link, neighbour.refusal = Link.REFUSED, text

    def heard(self, peer: PeerId, now_ms: float) -> bool:
        """Any message came from the peer; False if it is no neighbour."""
        neighbour = self._by_peer.get(peer)
        if neighbour is not None:
            neighbour.heard_ms = now_ms
        return neighbour is not None

    def forget(self, peer: PeerId) -> list[Action]:
        """The peer is lost; the membership may bring it back."""
        return [HangUp(peer)] if self._by_peer.pop(peer, None) is not None else []

    def on_tick(self, now_ms: float) -> tuple[list[Action], list[PeerId]]:
        """Pings that are due; second result: peers silent for too long."""
        silent = [p for p, n in self._by_peer.items() if now_ms - n.heard_ms > self._silent_ms]
        actions: list[Action] = []
        for peer, neighbour in self._by_peer.items():
            if now_ms - neighbour.pinged_ms < PING_MS:
                continue
            neighbour.pinged_ms = now_ms
            self._pings += 1
            if neighbour.link is Link.DIALLED:
                actions.append(Send(peer, Hello(member=self._mine)))  # the first one may have been lost
            actions.append(Send(peer, Ping(sequence=self._pings)))
        return actions, silent

    def ready(self, worker: WorkerId, life: PeerId | None = None) -> PeerId | None:
        """The living incarnation of a decode worker that KV can be sent to; with `life`, that one or none."""
        for peer, neighbour in self._by_peer.items():
            decodes = neighbour.member.id == worker and neighbour.member.role == "decode"
            if decodes and neighbour.link is Link.READY and life in (None, peer):
                return peer
        return None

    def link(self, peer: PeerId) -> BlockLink | None:
        """The way to the blocks of a process that is connected."""
        neighbour = self._by_peer.get(peer)
        if neighbour is None or neighbour.link is not Link.READY or neighbour.transport is None:
            return None
        rate = neighbour.transport.gib_per_s * 2**30
        is_store = neighbour.member.role == "kvstore"
        return BlockLink(peer, neighbour.transport.kind in SHARED_KINDS, self.block_bytes, is_store, rate)

    def store(self) -> BlockLink | None:
        """The KV store to use: one that shares memory with us if there is one, else the first by name."""
        ready = [n for n in self._by_peer.values() if n.member.role == "kvstore" and n.link is Link.READY]
        if not ready:
            return None
        best = min(ready, key=lambda n: (self.transport(n.peer) not in SHARED_KINDS, n.member.id))
        return self.link(best.peer)

    def why_not(self, worker: WorkerId, life: PeerId | None = None) -> str:
        """Why `ready` gives None."""
        for peer, neighbour in self._by_peer.items():
            if neighbour.member.id == worker:
                if neighbour.member.role != "decode":
                    return f"it is a {neighbour.member.role} worker"
                if life not in (None, peer):
                    return f"{peer} is known here, and {life} was asked for"
                return neighbour.refusal or f"its connection is only {neighbour.link.name.lower()}"
        return "it is not in the membership or has stopped answering"

    def transport(self, peer: PeerId) -> str:
        """Kind of the channel to a peer; empty if there is none."""
        neighbour = self._by_peer.get(peer)
        return neighbour.transport.kind if neighbour is not None and neighbour.transport else ""

    @property
    def transports(self) -> tuple[TransportReport, ...]:
        """All probed channels."""
        return tuple(n.transport for n in self._by_peer.values() if n.transport is not None)
