"""The gateway's real core in the pure world, with clients who know the right answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from common.errors import ServingError
from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages import AnyMessage
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Member
from common.messages.requests import FetchHint, Generate, Sampling
from common.policy.routing import Router
from gateway.core.actions import Action, Deliver, End, Note
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
from tests.gateway.core.builders import NoTree
from tests.support.fake_engine import answer

if TYPE_CHECKING:
    from tests.support.world_faults import FaultyWorld

KEY = "key"


@dataclass
class Client:
    """Who asked, and what came."""

    request: RequestId
    prompt: tuple[int, ...]
    truth: list[int]
    asked_ms: float
    timeout_ms: float
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: ServingError | None = None
    cancelled: bool = False
    """It left, or its gateway died."""
    ended_ms: float | None = None

    @property
    def done(self) -> bool:
        return self.cancelled or self.finish is not None or self.error is not None


class GatewayShell:
    """One life of a gateway."""

    def __init__(self, world: FaultyWorld, life: int, *, timeout_ms: float, rng: random.Random) -> None:
        self.member = Member(
            id=WorkerId("gateway-0"), role="gateway", incarnation=Incarnation(life), endpoint="", host="h", pid=0
        )
        self.peer: PeerId = peer_id(self.member.id, self.member.incarnation)
        self._world, self.timeout_ms = world, timeout_ms
        router = Router(prefill="round-robin", decode="round-robin", local_prefill_tokens=0, fallback=True)
        roster = Roster(
            this=self.member, silent_ms=3_000.0, fit=Fit("m", 1000), breaker=BreakerTerms(failures=0), fallback=True
        )
        totals = RoutingTotals()
        placement = Placement(roster, router, NoTree(), totals)
        self.keys = KeyLimits({KEY: KeyTerms(name=KEY, max_inflight=10_000)})
        draw = rng.random
        parts = Parts(roster=roster, placement=placement, keys=self.keys, totals=totals, draw=draw)
        self.core = Dispatch(
            parts, Terms(timeout_ms=timeout_ms, max_open=64, max_waiting=64, retry=RetryTerms()), fallback=True
        )
        self.clients: dict[RequestId, Client] = {}

    # -- clients

    def submit(self, name: str, prompt: tuple[int, ...], max_tokens: int, priority: int, now_ms: float) -> None:
        request = RequestId(name)
        truth = answer(list(prompt), max_tokens)
        client = Client(request, prompt, truth, now_ms, self.timeout_ms)
        self.clients[request] = client
        order = Order(
            request=request,
            prompt=prompt,
            sampling=Sampling(max_tokens=max_tokens),
            model="m",
            key=KEY,
            priority=priority,
        )
        self._world.say(self.peer, "", f"client asks for {name}", (name,))
        try:
            actions = self.core.submit([order], now_ms)
        except ServingError as error:
            client.error, client.ended_ms = error, now_ms
            return
        self.perform(actions)

    def cancel(self, request: RequestId, now_ms: float) -> None:
        client = self.clients[request]
        if not client.done:
            client.cancelled, client.ended_ms = True, now_ms
            self._world.say(self.peer, "", f"the client of {request} leaves", (request,))
            self.perform(self.core.cancel(request, now_ms))

    def leave_all(self, now_ms: float) -> None:
        """The gateway dies, and with it every connection of a client."""
        for client in self.clients.values():
            if not client.done:
                client.cancelled, client.ended_ms = True, now_ms

    # -- the shell

    def hear(self, source: PeerId, message: AnyMessage, now_ms: float) -> None:
        self.perform(self.core.on_message(source, message, now_ms))

    def tick(self, now_ms: float) -> None:
        self.perform(self.core.on_tick(now_ms))

    def on_members(self, members: list[Member], now_ms: float) -> None:
        self.perform(self.core.on_members(members, now_ms))

    def perform(self, actions: list[Action]) -> None:
        waiting = list(actions)
        while waiting:
            action = waiting.pop(0)
            match action:
                case Deliver():
                    self._deliver(action)
                case End(request, error):
                    client = self.clients[request]
                    assert not client.done or client.cancelled, f"{request} ends twice"
                    client.error, client.ended_ms = error, self._world.now_ms
                    self._world.say(self.peer, "", f"{request} ends: {error.code}: {error}", (request,))
                case Send(to, message):
                    if isinstance(message, Generate) and self._world.hints:
                        message = self._hinted(to, message)
                    if not self._world.send_from(self.peer, to, message):
                        waiting += self.core.on_unsent(to, message, self._world.now_ms)
                case Dial(peer, _):
                    self._world.wires.dial(self.peer, peer)
                case HangUp(peer):
                    self._world.hang_up(self.peer, peer)
                case Note(event, worker, text):
                    self._world.say(self.peer, "", f"{event} {worker}: {text}")
        self.core.check()

    def _hinted(self, to: PeerId, message: Generate) -> Generate:
        """Another worker of that role may hold the prompt, or once did."""
        role = to.partition("-")[0]
        others = [peer for peer in self._world.everybody() if peer != to and peer.startswith(role)]
        if not others:
            return message
        hint = FetchHint(holder=others[-1], n_blocks=len(message.prompt) // 4)
        return msgspec.structs.replace(message, fetch=hint)

    def _deliver(self, action: Deliver) -> None:
        """Tokens are those of the truth, in order, without gaps or repeats."""
        client, delta = self.clients[action.request], action.delta
        if client.cancelled:
            return
        client.tokens += delta.tokens
        right = client.truth[: len(client.tokens)]
        assert client.error is None and client.finish is None, f"{client.request}: tokens after its end"
        if client.tokens != right:
            text = f"{client.request}: wrong tokens at {len(client.tokens) - len(delta.tokens)}: {delta.tokens}"
            raise self._world.violation(f"{text}, right is {right[-3:]}", (client.request,))
        if delta.finish is not None:
            client.finish, client.ended_ms = delta.finish, self._world.now_ms
            if client.tokens != client.truth:
                raise self._world.violation(f"{client.request} finished too early", (client.request,))
