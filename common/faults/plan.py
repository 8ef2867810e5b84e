"""Decides, hit by hit, what goes wrong. The same rules and hits give the same faults, in a process as in a test."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.faults.points import CARRY_KV, Kind, Point, Side
from common.faults.rules import Rule

_DRAW_BYTES = 7  # 56 bits: exact in a float
SWAP_WAIT_MS = 200.0
"""How long a message that is to change places waits for the next one, unless its rule says so."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that strikes now."""

    rule: Rule
    side: Side
    hit: int
    """Which hit of this rule it is, from 1."""
    news: bool = True
    """False if it only goes on: a cut that was told of before."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of one hit."""

    faults: tuple[Fault, ...] = ()

    def has(self, *kinds: Kind) -> bool:
        """Whether one of these strikes."""
        return any(fault.rule.kind in kinds for fault in self.faults)

    def ms_of(self, kind: Kind) -> float:
        """All milliseconds that rules of this kind ask for."""
        return sum(fault.rule.ms for fault in self.faults if fault.rule.kind is kind)

    @property
    def swap_wait_ms(self) -> float:
        """How long a message may wait for the one that it changes places with."""
        return self.ms_of(Kind.REORDER) or SWAP_WAIT_MS


NOTHING = Outcome()


@dataclass(slots=True)
class _RuleState:
    """How far one rule has come. Lives as long as the plan."""

    rule: Rule
    number: int
    """Of the rule in the plan: two that read alike draw differently."""
    hits: int = 0
    strikes: int = 0
    cut_off: set[str] = field(default_factory=set)
    """Peers that a cut has struck; only asked for membership."""

    def hit(self, side: Side, peer: str, *, carries_kv: bool) -> Fault | None:
        rule = self.rule
        if rule.kind is Kind.CUT and peer in self.cut_off and rule.side in (None, side):
            self.hits += 1
            return Fault(rule, side, self.hits, news=False)
        if not _concerns(rule, side, peer, carries_kv=carries_kv):
            return None
        self.hits += 1
        if self.hits <= rule.after or (rule.times is not None and self.strikes >= rule.times):
            return None
        if rule.share < 1.0 and _draw(rule.seed, self.number, self.hits) >= rule.share:
            return None
        self.strikes += 1
        if rule.kind is Kind.CUT:
            self.cut_off.add(peer)
        return Fault(rule, side, self.hits)


def _concerns(rule: Rule, side: Side, peer: str, *, carries_kv: bool) -> bool:
    if rule.side is not None:
        return rule.side is side and peer.startswith(rule.peer)
    of_kv = rule.kind is Kind.CORRUPT and rule.point in CARRY_KV
    return peer.startswith(rule.peer) and (not of_kv or carries_kv or side is Side.WORK)


def _draw(seed: int, number: int, hit: int) -> float:
    """In [0, 1), independent for every rule and hit."""
    digest = hashlib.blake2b(f"{seed}/{number}/{hit}".encode(), digest_size=_DRAW_BYTES).digest()
    return int.from_bytes(digest, "big") / float(1 << 8 * _DRAW_BYTES)


class FaultPlan:
    """The rules of one process, how often each was hit, and what they did. One thread at a time."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """`rules`: those that this process obeys."""
        self._states: dict[Point, list[_RuleState]] = {}
        for number, rule in enumerate(rules):
            self._states.setdefault(rule.point, []).append(_RuleState(rule, number))
        self.injected: Counter[tuple[Point, Kind]] = Counter()
        """Faults so far."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """In the order in which they were given."""
        states = sorted((state for states in self._states.values() for state in states), key=lambda one: one.number)
        return tuple(state.rule for state in states)

    def hit(self, point: Point, side: Side, peer: str = "", *, carries_kv: bool = False) -> Outcome:
        """A point is struck. `peer`: id of the other side; `carries_kv`: whether a message is followed by KV."""
        states = self._states.get(point)
        if states is None:
            return NOTHING
        found = [state.hit(side, peer, carries_kv=carries_kv) for state in states]
        faults = tuple(fault for fault in found if fault is not None)
        for fault in faults:
            self.injected[point, fault.rule.kind] += 1
        return Outcome(faults) if faults else NOTHING
