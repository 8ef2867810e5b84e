"""A gateway's cores with workers that are ready, and short words for what goes in and comes out."""

import random
from collections.abc import Sequence

from common.block_hash import BlockHash
from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages.actions import Send
from common.messages.liveness import Member, PageCounts, QueueCounts, Report, Welcome
from common.messages.requests import Cancel, Failed, Generate, Sampling, TokenDelta, Tokens
from common.policy.holdings import NoHoldings
from common.policy.routing import Router
from gateway.core.actions import Action, Deliver, End
from gateway.core.breaker import BreakerTerms
from gateway.core.dispatch import Dispatch
from gateway.core.inflight import Parts
from gateway.core.keys import KeyLimits, KeyTerms
from gateway.core.order import Order
from gateway.core.placement import Placement
from gateway.core.recovery import RetryTerms
from gateway.core.roster import Fit, Roster
from gateway.core.terms import Terms
from gateway.core.totals import RoutingTotals
from tests.gateway.model import NAME, VOCAB_TOKENS, identity

SILENT_MS, TIMEOUT_MS = 3000.0, 60_000.0
ONCE = RetryTerms(attempts=1)
PLAIN = Router(prefill="round-robin", decode="round-robin", local_prefill_tokens=0, fallback=False)


class NoTree(NoHoldings):
    """Nobody tells what is cached."""

    def synced(self, now_ms: float) -> bool:
        """Never."""
        return False

    def match(self, names: Sequence[BlockHash]) -> "NoTree":
        """Nothing is known."""
        return self

    def expect(self, peer: PeerId, names: Sequence[BlockHash], now_ms: float) -> None:
        """Forgotten at once."""

    def forget(self, peer: PeerId) -> None:
        """There is nothing to forget."""


def member(name: str, incarnation: int = 1) -> Member:
    return Member(
        id=WorkerId(name),
        role=name.split("-")[0],
        incarnation=Incarnation(incarnation),
        endpoint=f"tcp://{name}",
        host="h",
        pid=1,
        model=identity(),
    )


def peer(name: str, incarnation: int = 1) -> PeerId:
    return peer_id(WorkerId(name), Incarnation(incarnation))


def parts(
    *,
    router: Router = PLAIN,
    tree: object = None,
    keys: dict[str, KeyTerms] | None = None,
    breaker: BreakerTerms | None = None,
    seed: int = 0,
) -> Parts:
    this = Member(id=WorkerId("gateway-0"), role="gateway", incarnation=Incarnation(9), endpoint="", host="", pid=0)
    fit = Fit(NAME, VOCAB_TOKENS)
    roster = Roster(this=this, silent_ms=SILENT_MS, fit=fit, breaker=breaker, fallback=router.fallback)
    totals = RoutingTotals()
    placement = Placement(roster, router, tree or NoTree(), totals)  # type: ignore[arg-type]  # a test's own tree
    draw = random.Random(seed).random
    return Parts(roster=roster, placement=placement, keys=KeyLimits(keys or {}), totals=totals, draw=draw)


def dispatch(
    *names: str, max_open: int = 100, max_waiting: int = 0, retry: RetryTerms = ONCE, **options: object
) -> Dispatch:
    """A gateway whose workers are all ready at time 0; it tries every request once unless told otherwise."""
    terms = Terms(timeout_ms=TIMEOUT_MS, max_open=max_open, max_waiting=max_waiting, retry=retry)
    core = Dispatch(parts(**options), terms, fallback=False)  # type: ignore[arg-type]  # a builder
    core.on_members([member(name) for name in names], 0.0)
    for name in names:
        core.on_message(peer(name), Welcome(member=member(name)), 0.0)
    return core


def order(name: str = "r", prompt_tokens: int = 4, *, max_tokens: int = 8, **changes: object) -> Order:
    return Order(
        request=RequestId(name),
        prompt=(1,) * prompt_tokens,
        sampling=Sampling(max_tokens=max_tokens),
        model=NAME,
        **changes,  # type: ignore[arg-type]  # a builder
    )


def tokens(position: int, *new: int, finish: str | None = None, request: str = "r") -> Tokens:
    return Tokens(deltas=(TokenDelta(RequestId(request), position, new, finish),))


def failed(request: str = "r", code: str = "busy", *, retryable: bool = True, phase: str = "grant") -> Failed:
    return Failed(request=RequestId(request), code=code, phase=phase, text="full", retryable=retryable)


def report(
    name: str, sequence: int = 1, *, draining: bool = False, queue: QueueCounts | None = None, **more: object
) -> Report:
    return Report(
        worker=WorkerId(name),
        role=name.split("-")[0],
        incarnation=Incarnation(1),
        sequence=sequence,
        queue=queue or QueueCounts(),
        draining=draining,
        **{"pages": PageCounts(), **more},  # type: ignore[arg-type]  # a builder
    )


def delivered(actions: list[Action]) -> list[int]:
    return [token for action in actions if isinstance(action, Deliver) for token in action.delta.tokens]


def cancels(actions: list[Action]) -> list[PeerId]:
    return [action.to for action in actions if isinstance(action, Send) and isinstance(action.message, Cancel)]


def ends(actions: list[Action]) -> list[End]:
    return [action for action in actions if isinstance(action, End)]


def generates(actions: list[Action]) -> list[tuple[PeerId, Generate]]:
    return [(a.to, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, Generate)]
