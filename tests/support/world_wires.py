"""Connections of a pure world, and what the fault kit's rules do to the messages on them, in virtual time. No processes.

As ZeroMQ's: who dialled may always send, and messages to somebody who is not there are lost in silence; the other side
is told that it cannot send once its caller has hung up or died. A connection comes back by itself when somebody listens at
the same address again: what is said on it then, or waited for that, is heard by the new life, and what that answers comes
under the name that was dialled. Who has dialled both lives has two connections to the new one, and what is late on the older
one is overtaken by what is said on the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from common.faults.line import FaultyLine
from common.faults.plan import NOTHING, FaultPlan, Outcome
from common.faults.points import Kind, Point, Side, points_of
from common.faults.rules import Rule, rules_for
from common.ids import PeerId
from common.messages.base import Message
from tests.support.world_cluster import Link
from tests.support.world_memory import Page
from tests.support.world_trace import Event, Trace, is_quiet, names_of, pages_of

Connection = tuple[PeerId, PeerId, PeerId]
"""Who speaks, under which name; who hears; whom the speaker means, who may be dead."""
_LOST = (Kind.DROP, Kind.CUT, Kind.FAIL)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message on its way, with its payloads, and what was done to it so far."""

    message: Message
    payloads: list[list[Page]]
    sent_ms: float
    fate: str = ""


class Wires:
    """Owns what is dialled, what is on its way, and how often each process has struck each rule."""

    def __init__(self, trace: Trace, lives: Callable[[PeerId], bool]) -> None:
        self._trace, self._lives = trace, lives
        self.dialled: dict[Link, None] = {}
        self._addresses: dict[PeerId, str] = {}
        self._waiting: dict[Link, list[tuple[Parcel, Outcome]]] = {}
        """What was said on connections that nobody listens at now."""
        self._flying: dict[Connection, FaultyLine[Parcel]] = {}
        self._landing: dict[Connection, FaultyLine[Parcel]] = {}
        self.rules: tuple[Rule, ...] = ()
        self._plans: dict[PeerId, FaultPlan] = {}
        self.ends: list[tuple[Kind, PeerId]] = []
        """Who kills or stops itself, by a rule, as soon as the event is over."""
        self.lost: list[tuple[Link, Message]] = []
        """What a rule has lost."""
        self.injected: dict[str, int] = {}
        self.inherited: dict[str, int] = {}
        """Messages by kind that another life heard than was meant, or said under the name of an older one."""

    def arm(self, rules: Sequence[Rule]) -> None:
        """From now on these, and no others."""
        self.rules = tuple(rules)
        self._plans.clear()

    # -- connections

    def dial(self, mine: PeerId, peer: PeerId) -> None:
        self.dialled[mine, peer] = None

    def listen(self, peer: PeerId, old: PeerId | None, now_ms: float) -> None:
        """A new life listens where an old one did, and who dialled that one is connected to it; None: where nobody has."""
        address = None if old is None else self._addresses.get(old)
        if address is not None:
            self._trace.note(Event(now_ms, peer, "", f"will listen where {old} did"))
        self._addresses[peer] = address = address or str(peer)
        for (source, target), waiting in list(self._waiting.items()):
            if self._addresses.get(target) == address:
                del self._waiting[source, target]
                for parcel, outcome in waiting:
                    self._count_inherited(parcel.message)
                    self._put(self._flying, (source, peer, target), parcel, outcome, now_ms)

    def _lives_of(self, peer: PeerId) -> list[PeerId]:
        """All that ever listened where it does, the latest first."""
        address = self._addresses.get(peer)
        return (
            [peer] if address is None else [one for one in reversed(self._addresses) if self._addresses[one] == address]
        )

    def hang_up(self, mine: PeerId, peer: PeerId) -> None:
        self.dialled.pop((mine, peer), None)
        self._waiting.pop((mine, peer), None)
        if (peer, mine) not in self.dialled:
            self._empty(lambda one: one[:2] in ((mine, peer), (peer, mine)))

    def bury(self, peer: PeerId) -> None:
        """What it said and was not heard is lost, also under the names of lives before it; so is all that is said to it."""
        for link in [link for link in self.dialled if link[0] == peer]:
            del self.dialled[link]
        for link in [link for link in self._waiting if link[0] == peer]:
            del self._waiting[link]
        dead = [one for one in self._lives_of(peer) if one == peer or not self._lives(one)]
        self._empty(lambda one: one[0] in dead or one[1] == peer)

    def _empty(self, of: Callable[[Connection], bool]) -> None:
        for lines in (self._flying, self._landing):
            for connection in [one for one in lines if of(one)]:
                del lines[connection]

    def _name_for(self, source: PeerId, target: PeerId) -> PeerId | None:
        """Under which name the target hears it: that which it dialled, if the source did not dial. None: no connection."""
        if (source, target) in self.dialled or (target, source) in self.dialled:
            return source
        return next((one for one in self._lives_of(source) if (target, one) in self.dialled), None)

    def can_send(self, source: PeerId, target: PeerId) -> bool:
        return (source, target) in self.dialled or (self._name_for(source, target) is not None and self._lives(target))

    # -- messages

    def send(self, source: PeerId, target: PeerId, message: Message, payloads: list[list[Page]], now_ms: float) -> bool:
        """False if the sender is told that it cannot."""
        outcome = self._strike(source, target, message, Side.SENT) if self.can_send(source, target) else None
        name = self._name_for(source, target)
        if outcome is None or name is None or outcome.has(Kind.FAIL):
            self._note(source, target, message, "cannot be sent", now_ms)
            return False
        parcel = Parcel(message, payloads, now_ms, _words(outcome))
        listens = next((one for one in self._lives_of(target) if self._lives(one)), None)
        if listens is not None:
            if (name, listens) != (source, target):
                self._count_inherited(message)
            self._put(self._flying, (name, listens, target), parcel, outcome, now_ms)
        else:
            self._note(source, target, message, "nobody is there", now_ms)
            self._waiting.setdefault((name, target), []).append((parcel, outcome))
        return True

    def _count_inherited(self, message: Message) -> None:
        kind = type(message).__name__
        self.inherited[kind] = self.inherited.get(kind, 0) + 1

    def pump(self, now_ms: float) -> None:
        """What has flown long enough is at its target, where other rules may strike it."""
        for connection, line in self._flying.items():
            source, target, _ = connection
            for parcel in line.take(now_ms):
                outcome = self._strike(target, source, parcel.message, Side.HEARD)
                fate = " ".join(word for word in (parcel.fate, _words(outcome)) if word)
                heard = Parcel(parcel.message, parcel.payloads, parcel.sent_ms, fate)
                self._put(self._landing, connection, heard, outcome, now_ms)

    def landed(self, now_ms: float) -> Iterator[tuple[Link, Parcel]]:
        """What can be heard now."""
        for (source, target, _), line in list(self._landing.items()):
            for parcel in line.take(now_ms):
                yield (source, target), parcel

    @property
    def due_ms(self) -> float | None:
        """When something moves."""
        lines = (*self._flying.values(), *self._landing.values())
        return min((line.due_ms for line in lines if line.due_ms is not None), default=None)

    def _put(
        self,
        lines: dict[Connection, FaultyLine[Parcel]],
        connection: Connection,
        parcel: Parcel,
        outcome: Outcome,
        now_ms: float,
    ) -> None:
        source, target, _ = connection
        if outcome.has(*_LOST, Kind.CORRUPT):
            self.lost.append(((source, target), parcel.message))
            self._note(source, target, parcel.message, parcel.fate or _words(outcome), now_ms)
        else:
            lines.setdefault(connection, FaultyLine()).put(parcel, outcome, now_ms)

    # -- rules

    def _strike(self, actor: PeerId, other: PeerId, message: Message, side: Side) -> Outcome:
        if not self.rules:
            return NOTHING
        faults = [f for point in points_of(message, side) for f in self._hit(actor, point, side, other).faults]
        return Outcome(tuple(faults))

    def work(self, actor: PeerId, point: Point, other: str = "") -> Outcome:
        """A process is about to do something that is no message."""
        return self._hit(actor, point, Side.WORK, other) if self.rules else NOTHING

    def _hit(self, actor: PeerId, point: Point, side: Side, other: str) -> Outcome:
        if actor not in self._plans:
            self._plans[actor] = FaultPlan(rules_for(self.rules, actor))
        outcome = self._plans[actor].hit(point, side, other)
        for fault in outcome.faults:
            name = f"{point}:{fault.rule.kind}"
            self.injected[name] = self.injected.get(name, 0) + 1
            if fault.rule.kind in (Kind.KILL, Kind.STOP):
                self.ends.append((fault.rule.kind, actor))
        return outcome

    def _note(self, source: PeerId, target: PeerId, message: Message, fate: str, now_ms: float) -> None:
        pages = pages_of(source, message)
        self._trace.note(Event(now_ms, source, target, message, fate, names_of(message), pages))

    def note_heard(self, link: Link, parcel: Parcel, now_ms: float) -> None:
        """A line for a message that arrives; signs of life make none."""
        if is_quiet(parcel.message) and not parcel.fate:
            return
        late_ms = now_ms - parcel.sent_ms
        late = f"sent {late_ms:.0f} ms ago" if late_ms >= 20 else ""
        self._note(*link, parcel.message, " ".join(word for word in (parcel.fate, late) if word), now_ms)


_WORDS = {Kind.DROP: "dropped", Kind.CUT: "cut off", Kind.DUPLICATE: "twice", Kind.REORDER: "changes places"}
_WORDS |= {Kind.DELAY: "delayed", Kind.CORRUPT: "corrupt", Kind.KILL: "kills", Kind.STOP: "stops", Kind.FAIL: "fails"}


def _words(outcome: Outcome) -> str:
    """What a rule does, for people."""
    return " ".join(_WORDS.get(fault.rule.kind, str(fault.rule.kind)) for fault in outcome.faults)
