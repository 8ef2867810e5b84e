"""A process that joined the membership, was welcomed, and then says what nobody should to everybody it knows."""

import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages import encode
from common.messages.base import Message
from common.messages.blocks import Find
from common.messages.liveness import Drain, Hello, Member, Welcome
from common.net.redis import Registry
from common.net.sockets import Exchange
from tests.hostile.absurd import KINDS, Absurd

_LENGTHS = (0, 1, 4095, 65_536)
_LIMIT_S = 20.0
SPOKEN = tuple(kind for kind in KINDS if kind not in (Hello, Welcome, Drain))
"""What it does not lie about: who it is. Drain is an operator's order, which a gateway may give."""


class Liar:
    """One thread. `like`: the member whose role and model it claims, under a name of its own."""

    def __init__(self, like: Member, name: str, chance: random.Random) -> None:
        self._chance = chance
        incarnation = Incarnation(chance.getrandbits(63))
        peer = peer_id(WorkerId(name), incarnation)
        self.exchange = Exchange(peer, "tcp://127.0.0.1:0")
        fields = {"id": name, "incarnation": incarnation, "endpoint": self.exchange.endpoint, "share_path": None}
        self.member = msgspec.structs.replace(like, **fields)
        self.said: Counter[str] = Counter()
        self._peers: list[PeerId] = []
        self._welcomed: set[PeerId] = set()

    def join(self, registry: Registry, members: Iterable[Member]) -> None:
        """Be announced and welcomed by all of them."""
        registry.announce(self.member)
        for member in members:
            peer = peer_id(member.id, member.incarnation)
            self._peers.append(peer)
            self.exchange.dial(peer, member.endpoint)
        deadline_s = time.monotonic() + _LIMIT_S
        while not self._welcomed.issuperset(self._peers):
            assert time.monotonic() < deadline_s, f"only {self._welcomed} welcome {self.member.id}"
            for peer in set(self._peers) - self._welcomed:
                self.exchange.send(peer, Hello(member=self.member))
            self.hear(50)

    def hear(self, wait_ms: float = 0) -> list[Message]:
        """What others said; whoever greets it is welcomed."""
        heard: list[Message] = []
        for peer, message, _ in self.exchange.receive(wait_ms):
            match message:
                case Welcome():
                    self._welcomed.add(peer)
                case Hello():
                    self.exchange.send(peer, Welcome(member=self.member))
                case _:
                    heard.append(message)
        return heard

    def lie(self, count: int, known: Mapping[str, Sequence[Any]], overheard: Sequence[Message]) -> None:
        """Absurd messages, others' own messages again, and Finds that nobody releases, with payloads of any length."""
        absurd = Absurd(self._chance, known)
        for number in range(count):
            message = absurd.message(SPOKEN)
            if overheard and number % 3 == 1:
                message = self._chance.choice(overheard)
            elif number % 3 == 2:
                message = Find(call=number, blocks=self._names(known), lease_ms=2**31, payloads=number % 2 == 0)
            payloads = [b"\0" * self._chance.choice(_LENGTHS) for _ in range(self._chance.choice((0, 0, 1, 3)))]
            self.said[type(message).__name__] += self._tell(self._chance.choice(self._peers), message, payloads)

    def _names(self, known: Mapping[str, Sequence[Any]]) -> tuple[bytes, ...]:
        """Of blocks that are somewhere, if any are known."""
        runs = [run for run in known.get("blocks", ()) if run and isinstance(run[0], bytes)]
        return self._chance.choice(runs) if runs else ()

    def _tell(self, peer: PeerId, message: Message, payloads: Sequence[bytes]) -> bool:
        """Past whoever listens to what honest processes send."""
        return self.exchange._send_frames(peer, [encode(message), *payloads])

    def babble(self, count: int, known: Mapping[str, Sequence[Any]]) -> None:
        """Frames that are next to a message."""
        absurd = Absurd(self._chance, known)
        for _ in range(count):
            self.said["frame"] += self.exchange._send_frames(self._chance.choice(self._peers), [absurd.frame()])

    def leave(self, registry: Registry) -> None:
        """Without a word."""
        registry.withdraw(self.member)
        self.exchange.close()
