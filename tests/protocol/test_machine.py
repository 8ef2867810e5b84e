"""Whatever a link, copies and processes do to real cores, tokens are right, pages are safe, and everything comes back.

A failing example prints its steps and what happened to the requests and pages concerned, in virtual time. More examples:
PROTOCOL_EXAMPLES=2000 python -m pytest tests/protocol
"""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from common.faults.points import Kind, Point
from common.faults.rules import Rule
from tests.protocol.schedule import LEASE_MS, MESSAGE_KINDS, MESSAGE_POINTS, SYSTEMS, Schedule, random_schedule

EXAMPLES = int(os.environ.get("PROTOCOL_EXAMPLES", "0"))
FEW, SEEDS, STEPS = EXAMPLES or 5, EXAMPLES or 6, 30
_WHICH = st.integers(0, 7)
_SHARES, _TIMES = st.sampled_from((0.3, 1.0)), st.sampled_from((1, 3, 30))
_DELAYS_MS = st.sampled_from((20.0, 700.0, 4_000.0, 12_000.0))


@st.composite
def rules_of_messages(draw: Callable) -> Rule:
    kind = draw(st.sampled_from(MESSAGE_KINDS))
    ms = draw(_DELAYS_MS) if kind is Kind.DELAY else 0.0
    point, share, times = draw(st.sampled_from(MESSAGE_POINTS)), draw(_SHARES), draw(_TIMES)
    return Rule(point=point, kind=kind, share=share, times=times, ms=ms)


@st.composite
def rules_of_copies(draw: Callable) -> Rule:
    point = draw(st.sampled_from((Point.TRANSFER, Point.FETCH, Point.SPILL)))
    kind = draw(st.sampled_from((Kind.DELAY, Kind.FAIL)))
    ms = draw(_DELAYS_MS) if kind is Kind.DELAY else 0.0
    return Rule(point=point, kind=kind, share=draw(_SHARES), times=draw(_TIMES), ms=ms)


class Cluster(RuleBasedStateMachine):
    """Steps of a schedule in any order; its laws are checked on the way and at the end."""

    @initialize(
        seed=st.integers(0, 10**6),
        system=st.sampled_from(sorted(SYSTEMS)),
        timeout_ms=st.sampled_from((4_000.0, 120_000.0)),
        ahead=st.booleans(),
    )
    def begin(self, seed: int, system: str, timeout_ms: float, ahead: bool) -> None:
        self.schedule = Schedule(seed, system, timeout_ms=timeout_ms, ahead=ahead)

    @rule(tokens=st.sampled_from((1, 4, 5, 12, 30)), most=st.sampled_from((1, 2, 6, 12)), shared=st.booleans())
    def ask(self, tokens: int, most: int, shared: bool) -> None:
        self.schedule.ask(tokens, most, shared)

    @rule(which=_WHICH, tokens=st.sampled_from((1, 5)), most=st.sampled_from((1, 5, 12)))
    def ask_on(self, which: int, tokens: int, most: int) -> None:
        self.schedule.ask_on(which, tokens, most)

    @rule(n=st.integers(1, 60))
    def events(self, n: int) -> None:
        self.schedule.events(n)

    @rule(ms=st.sampled_from((5.0, 150.0, 900.0, 3_500.0)))
    def time(self, ms: float) -> None:
        self.schedule.time(ms)

    @rule(which=_WHICH)
    def leave(self, which: int) -> None:
        self.schedule.leave(which)

    @rule(rules=st.lists(st.one_of(rules_of_messages(), rules_of_copies()), max_size=4))
    def faults(self, rules: list[Rule]) -> None:
        self.schedule.faults(rules)

    @rule(late_ms=st.sampled_from((1.5 * LEASE_MS, 2.5 * LEASE_MS)))
    def slow_copy(self, late_ms: float) -> None:
        self.schedule.slow_copy(late_ms)

    @rule(one=_WHICH, other=_WHICH)
    def cut(self, one: int, other: int) -> None:
        self.schedule.cut(one, other)

    @rule(which=_WHICH)
    def stop(self, which: int) -> None:
        self.schedule.stop(which)

    @rule()
    def go_on(self) -> None:
        self.schedule.go_on()

    @rule(which=_WHICH)
    def kill(self, which: int) -> None:
        self.schedule.kill(which)

    @precondition(lambda self: self.schedule.world.n_dead)
    @rule(which=_WHICH, same_address=st.booleans(), unseen_ms=st.sampled_from((0.0, 300.0, 5_000.0)))
    def restart(self, which: int, same_address: bool, unseen_ms: float) -> None:
        self.schedule.restart(which, same_address, unseen_ms)

    def teardown(self) -> None:
        if hasattr(self, "schedule") and self.schedule.unbroken:
            self.schedule.end()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=FEW,
    stateful_step_count=STEPS,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_schedule_keeps_the_laws(seed: int) -> None:
    random_schedule(seed)
