"""Attempts that workers were told to end, until each worker has said that it knows them no more. Pure.

A Cancel can be lost with a connection that breaks for a moment, and a worker that was stopped for so long that it was
given up hears none. Whoever sends tokens of such an attempt gives itself away and is told again at once (Inflight); a
worker that computes its prompt, or keeps it in a queue, says nothing. So every Cancel comes with the question whether the
attempt is still there, and both are said again every AGAIN_MS until the answer is NotHere.

Owns one entry per worker and attempt. It leaves with NotHere, or with the request's deadline, which the worker keeps by
itself; while a worker is not connected, nothing is said to it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.requests import AskAbout, Cancel
from gateway.core.actions import Action

AGAIN_MS = 2_000.0
_MOST_OPEN = 4_096  # whose turn is next goes; an answer takes a round trip, so these are of workers that do not answer
_MOST_AT_ONCE = 256  # the rest has its turn at the next tick


@dataclass(frozen=True, slots=True)
class _Farewell:
    again_at_ms: float
    until_ms: float


class Farewells:
    """Says Cancel, and says it again."""

    def __init__(self) -> None:
        self._open: dict[tuple[PeerId, RequestId], _Farewell] = {}  # in the order of `again_at_ms`

    def __len__(self) -> int:
        return len(self._open)

    def expect(self, peers: Iterable[PeerId], wire: RequestId, until_ms: float, now_ms: float) -> None:
        """These may go on with it. `until_ms`: the request's deadline."""
        for peer in peers:
            self._open[peer, wire] = _Farewell(now_ms + AGAIN_MS, until_ms)
        while len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]

    def not_here(self, peer: PeerId, wire: RequestId) -> None:
        """The worker does not know it (any more)."""
        self._open.pop((peer, wire), None)

    def on_tick(self, now_ms: float, knows: Callable[[PeerId], bool]) -> list[Action]:
        """Cancel again what was not answered for a while, and ask about it. `knows`: whether a worker is connected."""
        about: dict[PeerId, list[RequestId]] = {}
        for (peer, wire), one in list(self._open.items())[:_MOST_AT_ONCE]:
            if now_ms < one.again_at_ms:
                break
            del self._open[peer, wire]
            if now_ms < one.until_ms:
                self._open[peer, wire] = _Farewell(now_ms + AGAIN_MS, one.until_ms)
                if knows(peer):
                    about.setdefault(peer, []).append(wire)
        return [action for peer, wires in about.items() for action in farewell(peer, wires)]


def farewell(peer: PeerId, wires: Sequence[RequestId]) -> list[Action]:
    """Cancel these, and say whether they are gone."""
    cancels: list[Action] = [Send(peer, Cancel(request=wire)) for wire in wires]
    return [*cancels, Send(peer, AskAbout(requests=tuple(wires)))]
