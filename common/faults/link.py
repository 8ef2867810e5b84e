"""Processes joined without sockets: the rules of the fault kit, decided and performed in virtual time."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.faults.line import FaultyLine
from common.faults.plan import NOTHING, Fault, FaultPlan, Outcome
from common.faults.points import Kind, Point, Side, points_of
from common.faults.rules import Rule, rules_for
from common.ids import PeerId
from common.messages.base import Message


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message on its way."""

    sender: PeerId
    receiver: PeerId
    message: Message
    n_payloads: int = 0
    """Frames of KV that follow it."""
    corrupt: bool = False
    """Whether a byte of its KV is another one. A message without KV that is corrupt does not arrive."""


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """One fault, or one delivery, for whoever reads what happened."""

    at_ms: float
    what: str
    """Kind of the fault; `arrived`; `lost`: to or from a dead process."""
    parcel: Parcel

    def __str__(self) -> str:
        one = self.parcel
        return f"{self.at_ms:10.1f} ms  {self.what:9} {one.sender} -> {one.receiver}  {one.message}"


class ScriptedLink:
    """Owns every message between `send` and `take`. The same rules and calls give the same deliveries.

    Each process obeys the rules that name it, and counts its own hits, as if each had a kit of its own. `kill` and `stop`
    put it into `dead` and `stopped`: whoever drives the link acts on it. Messages of and to the dead are lost; those to
    the stopped wait.
    """

    def __init__(self, rules: Sequence[Rule], *, latency_ms: float = 0.0) -> None:
        """`latency_ms`: of every message, beside its faults."""
        self._rules, self._latency_ms = tuple(rules), latency_ms
        self._plans: dict[PeerId, FaultPlan] = {}
        self._flying: dict[tuple[PeerId, PeerId], FaultyLine[Parcel]] = {}
        self._landing: dict[tuple[PeerId, PeerId], FaultyLine[Parcel]] = {}
        self.dead: set[PeerId] = set()
        self.stopped: set[PeerId] = set()
        self.log: list[LinkEvent] = []
        """Everything that happened, in order."""

    def send(self, parcel: Parcel, now_ms: float) -> bool:
        """A process sends; False if it is told that it cannot."""
        if parcel.sender in self.dead:
            self.log.append(LinkEvent(now_ms, "lost", parcel))
            return True
        outcome = self._strike(parcel, Side.SENT, now_ms)
        changed = _corrupted(parcel, outcome)
        if changed is not None and parcel.sender not in self.dead:
            key = (parcel.sender, parcel.receiver)
            self._flying.setdefault(key, FaultyLine()).put(changed, outcome, now_ms + self._latency_ms)
        return not outcome.has(Kind.FAIL)

    def take(self, now_ms: float) -> list[Parcel]:
        """What has arrived by `now_ms`, by sender and receiver, each in its order. Call in the order of time."""
        for key, line in self._flying.items():
            if key[1] in self.stopped:
                continue
            landing = self._landing.setdefault(key, FaultyLine())
            for parcel in line.take(now_ms):
                outcome = NOTHING if parcel.receiver in self.dead else self._strike(parcel, Side.HEARD, now_ms)
                changed = _corrupted(parcel, outcome)
                if changed is not None:
                    landing.put(changed, outcome, now_ms)
        running = [line for (_, receiver), line in self._landing.items() if receiver not in self.stopped]
        found = [parcel for line in running for parcel in line.take(now_ms)]
        arrived = [parcel for parcel in found if parcel.receiver not in self.dead]
        self.log += [LinkEvent(now_ms, "lost" if one.receiver in self.dead else "arrived", one) for one in found]
        return arrived

    def work(self, process: PeerId, point: Point, peer: PeerId | None = None) -> Outcome:
        """A process is about to do something that is no message, such as a copy."""
        outcome = self._plan_of(process).hit(point, Side.WORK, peer or "")
        self._end(process, outcome)
        return outcome

    @property
    def due_ms(self) -> float | None:
        """When something may arrive, or be heard; None: nothing is on its way to a process that runs."""
        lines = [*self._flying.items(), *self._landing.items()]
        times = [line.due_ms for (_, receiver), line in lines if receiver not in self.stopped]
        return min((due_ms for due_ms in times if due_ms is not None), default=None)

    def injected(self) -> dict[tuple[PeerId, Point, Kind], int]:
        """Faults so far, by process."""
        plans = self._plans.items()
        return {(peer, point, kind): n for peer, plan in plans for (point, kind), n in plan.injected.items()}

    def _strike(self, parcel: Parcel, side: Side, now_ms: float) -> Outcome:
        process, peer = parcel.sender, parcel.receiver
        if side is Side.HEARD:
            process, peer = peer, process
        plan = self._plan_of(process)
        faults: list[Fault] = []
        for point in points_of(parcel.message, side):
            faults += plan.hit(point, side, peer, carries_kv=parcel.n_payloads > 0).faults
        outcome = Outcome(tuple(faults))
        self.log += [LinkEvent(now_ms, str(fault.rule.kind), parcel) for fault in faults]
        self._end(process, outcome)
        return outcome

    def _end(self, process: PeerId, outcome: Outcome) -> None:
        if outcome.has(Kind.KILL):
            self.dead.add(process)
        if outcome.has(Kind.STOP):
            self.stopped.add(process)

    def _plan_of(self, process: PeerId) -> FaultPlan:
        if process not in self._plans:
            self._plans[process] = FaultPlan(rules_for(self._rules, process))
        return self._plans[process]


def _corrupted(parcel: Parcel, outcome: Outcome) -> Parcel | None:
    """The parcel as it goes on; None if it cannot be read any more."""
    if not outcome.has(Kind.CORRUPT):
        return parcel
    if not parcel.n_payloads:
        return None
    return Parcel(parcel.sender, parcel.receiver, parcel.message, parcel.n_payloads, corrupt=True)
