"""An Exchange whose messages meet the fault kit, where they are sent and where they are heard."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from common.clock import Clock, MonotonicClock
from common.faults.line import FaultyLine
from common.faults.plan import Fault, Outcome
from common.faults.points import Kind, Point, Side, points_of
from common.ids import PeerId
from common.log import Log
from common.messages import encode
from common.messages.base import Message
from common.messages.liveness import Report
from common.net.cluster_key import ClusterKey
from common.net.fault_kit import FaultKit
from common.net.sockets import Exchange, Payload, Received

_NEVER = b"\xc1"  # the one byte that MessagePack never uses


@dataclass(frozen=True, slots=True)
class _Outgoing:
    peer: PeerId
    frames: list[Payload]


@dataclass(slots=True)
class _Lines:
    """What is late in one direction, by peer. Signs of life have a line of their own: a slow peer is not a dead one."""

    sent: dict[tuple[PeerId, bool], FaultyLine[_Outgoing]] = field(default_factory=dict)
    heard: dict[tuple[PeerId, bool], FaultyLine[Received]] = field(default_factory=dict)


class FaultyExchange(Exchange):
    """As an Exchange. What is late waits here, never in a blocked call; it moves on whenever `send` or `receive` is called."""

    def __init__(
        self,
        self_id: PeerId,
        bind: str | None,
        kit: FaultKit,
        *,
        key: ClusterKey | None = None,
        log: Log | None = None,
        clock: Clock | None = None,
    ) -> None:
        """As Exchange."""
        super().__init__(self_id, bind, key=key, log=log)
        self._kit, self._lines = kit, _Lines()
        self._clock: Clock = clock or MonotonicClock()

    def send(self, peer: PeerId, message: Message, payloads: Sequence[Payload] = ()) -> bool:
        """As Exchange; also False if a rule lets it fail."""
        if isinstance(message, Report):
            message = self._signed(message)
        outcome, alive = self._strike(peer, message, Side.SENT, len(payloads))
        if outcome.has(Kind.FAIL):
            return False
        frames: list[Payload] = [encode(message), *payloads]
        if outcome.has(Kind.CORRUPT):
            frames = [frames[0], *_flipped(payloads)] if payloads else [_NEVER + bytes(frames[0][1:])]
        now_ms = self._clock.now_ms()
        line = self._lines.sent.get((peer, alive))
        if not outcome.faults and (line is None or line.due_ms is None):
            return self._send_frames(peer, frames)
        if line is None:
            line = self._lines.sent[peer, alive] = FaultyLine()
        line.put(_Outgoing(peer, frames), outcome, now_ms)
        self._send_due(now_ms)
        return True

    def receive(self, wait_ms: float) -> list[Received]:
        """As Exchange, with what has become due; waits no longer than until then."""
        self._kit.look()
        now_ms = self._clock.now_ms()
        self._send_due(now_ms)
        due_ms = self._due_ms()
        if due_ms is not None:
            wait_ms = min(wait_ms, max(0.0, due_ms - now_ms) + 1.0)
        arrived = super().receive(wait_ms)
        now_ms = self._clock.now_ms()
        self._send_due(now_ms)
        found: list[Received] = []
        for received in arrived:
            self._hear(received, found, now_ms)
        for line in self._lines.heard.values():
            found += line.take(now_ms)
        return found

    def hang_up(self, peer: PeerId) -> None:
        """As Exchange; what was late on the way is lost, as it is on any connection that ends."""
        super().hang_up(peer)
        for alive in (False, True):
            self._lines.sent.pop((peer, alive), None)
            self._lines.heard.pop((peer, alive), None)

    def counters(self) -> dict[str, float]:
        """As Exchange, and faults so far."""
        return {**super().counters(), **self._kit.counters()}

    def gauges(self) -> dict[str, float]:
        """That there are any."""
        return self._kit.gauges()

    def _hear(self, received: Received, found: list[Received], now_ms: float) -> None:
        peer, message, payloads = received
        outcome, alive = self._strike(peer, message, Side.HEARD, len(payloads))
        if outcome.has(Kind.CORRUPT):
            if not payloads:
                self.note_unparsed(peer, "a frame that was corrupted on purpose")
                return
            received = (peer, message, _flipped(payloads))
        line = self._lines.heard.get((peer, alive))
        if not outcome.faults and (line is None or line.due_ms is None):
            found.append(received)
            return
        if line is None:
            line = self._lines.heard[peer, alive] = FaultyLine()
        line.put(received, outcome, now_ms)
        found += line.take(now_ms)

    def _strike(self, peer: PeerId, message: Message, side: Side, n_payloads: int) -> tuple[Outcome, bool]:
        """What happens to it, and whether it is a sign of life."""
        points = points_of(message, side)
        faults: list[Fault] = []
        for point in points:
            faults += self._kit.strike(point, side, peer, carries_kv=n_payloads > 0).faults
        return Outcome(tuple(faults)), points[0] is Point.LIVENESS

    def _send_due(self, now_ms: float) -> None:
        for line in self._lines.sent.values():
            for late in line.take(now_ms):
                self._send_frames(
                    late.peer, late.frames
                )  # nobody waits for the answer any more: it is lost if it fails

    def _due_ms(self) -> float | None:
        times = [line.due_ms for line in self._lines.sent.values()]
        times += [line.due_ms for line in self._lines.heard.values()]
        return min((due_ms for due_ms in times if due_ms is not None), default=None)

    def _signed(self, report: Report) -> Report:
        return msgspec.structs.replace(
            report,
            counters={**report.counters, **self._kit.counters()},
            gauges={**report.gauges, **self._kit.gauges()},
        )


def open_exchange(
    self_id: PeerId, bind: str | None, kit: FaultKit | None, key: ClusterKey | None, log: Log
) -> Exchange:
    """The one that a process uses: without a kit nothing goes wrong on purpose. Raises ConfigError."""
    if kit is None:
        return Exchange(self_id, bind, key=key, log=log)
    return FaultyExchange(self_id, bind, kit, key=key, log=log)


def _flipped(payloads: Sequence[Payload]) -> list[Payload]:
    """One byte of the last one is another."""
    *rest, last = payloads
    changed = bytearray(last)
    if changed:
        changed[len(changed) // 2] ^= 0xFF
    return [*rest, changed]
