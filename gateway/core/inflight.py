"""Every request of one gateway, from routing to its end, without sockets or clocks.

Owns `_open`: each request with its deadline, the workers it was given to, and the next output position. An entry leaves
in one of five ways: its last token, a worker's Failed, the death of a worker it needs, its deadline, or the client's
cancel. Every way out releases what was charged and, except after the last token, cancels at all workers that still live.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import Busy, DeadlineExceeded, NoWorker, PeerFailed, ServingError
from common.ids import PeerId, RequestId, WorkerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.requests import Cancel, Failed, Generate, Sampling, TokenDelta, Tokens
from common.policy.routing import NoRoute, RoutingPolicy
from gateway.core.actions import Action, Deliver, End
from gateway.core.failure import WorkerFailed
from gateway.core.roster import Lost, Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One prompt to answer."""

    request: RequestId
    """Unique among all requests that any worker may remember."""
    prompt: tuple[int, ...]
    sampling: Sampling
    model: str
    cache_salt: str = ""
    """As in Generate."""


@dataclass(slots=True)
class _Open:
    request: RequestId
    deadline_ms: float
    timeout_ms: float
    prompt_tokens: int
    entry: PeerId
    entry_name: str
    """For people, such as `prefill worker prefill-0`."""
    decode: PeerId
    """The worker that sends the tokens; equals `entry` on a mixed worker."""
    decode_name: str
    next_position: int = 0
    prefilling: bool = True
    """Until the first token the entry worker is needed and charged."""

    @property
    def phase(self) -> str:
        return "prefill" if self.prefilling else "decode"

    @property
    def progress(self) -> str:
        """Where it stands, for error messages."""
        done = "before the first token" if self.prefilling else f"after {self.next_position} tokens"
        return f"in phase {self.phase} {done}"

    @property
    def needed(self) -> tuple[PeerId, ...]:
        """Workers whose death ends it."""
        return (self.entry, self.decode) if self.prefilling else (self.decode,)


class Inflight:
    """Decides; never performs."""

    def __init__(self, roster: Roster, policy: RoutingPolicy, *, timeout_ms: float, max_open: int) -> None:
        """`timeout_ms`: what each request has from its submission. `max_open`: one more is refused as busy."""
        self._roster, self._policy = roster, policy
        self._timeout_ms, self._max_open = timeout_ms, max_open
        self._open: dict[RequestId, _Open] = {}
        self._turn = 0
        self.repeated_tokens_total = 0

    def __len__(self) -> int:
        """Requests without an answer yet."""
        return len(self._open)

    def submit(self, order: Order, now_ms: float) -> list[Action]:
        """Route and send one request. Raises Busy or NoWorker, and then holds nothing."""
        if len(self._open) >= self._max_open:
            raise Busy(f"{len(self._open)} requests are in flight here, the limit is {self._max_open}; try again later")
        route = self._policy.choose(order.request, self._roster.views(now_ms), self._turn)
        if isinstance(route, NoRoute):
            raise NoWorker(f"no worker can take the request: {route.reason}")
        self._turn += 1
        entry, decode = route.entry, route.decode or route.entry
        one = _Open(
            order.request,
            deadline_ms=now_ms + self._timeout_ms,
            timeout_ms=self._timeout_ms,
            prompt_tokens=len(order.prompt),
            entry=self._roster.peer(entry),
            entry_name=f"{'mixed' if route.decode is None else 'prefill'} worker {entry}",
            decode=self._roster.peer(decode),
            decode_name=f"{'mixed' if route.decode is None else 'decode'} worker {decode}",
        )
        self._open[order.request] = one
        self._roster.charge(one.entry, tokens=one.prompt_tokens, requests=1)
        if one.decode != one.entry:
            self._roster.charge(one.decode, tokens=0, requests=1)
        return [Send(one.entry, self._generate(order, route.decode))]

    def _generate(self, order: Order, decode: WorkerId | None) -> Generate:
        return Generate(
            request=order.request,
            prompt=order.prompt,
            sampling=order.sampling,
            timeout_ms=round(self._timeout_ms),
            decode=decode,
            model=order.model,
            cache_salt=order.cache_salt,
        )

    def on_message(self, sender: PeerId, message: Tokens | Failed) -> list[Action]:
        """News of requests. What is said about requests of others, or by others, changes nothing."""
        if isinstance(message, Failed):
            return self._on_failed(sender, message)
        actions: list[Action] = []
        for delta in message.deltas:
            one = self._open.get(delta.request)
            if one is None:
                # Given up here, and the Cancel is still under way or was lost with a connection: say it again.
                if delta.finish is None:
                    actions.append(Send(sender, Cancel(request=delta.request)))
            elif one.decode == sender:
                actions += self._on_delta(one, delta)
        return actions

    def _on_delta(self, one: _Open, delta: TokenDelta) -> list[Action]:
        missing = delta.position - one.next_position
        if missing > 0:
            text = f"{one.decode_name} skipped {missing} tokens {one.progress}"
            return self._fail(one, PeerFailed(text))
        if missing < 0:
            self.repeated_tokens_total += min(-missing, len(delta.tokens))
            delta = _without_first(delta, -missing)
            if not delta.tokens and delta.finish is None:
                return []
        if delta.tokens and one.prefilling:
            self._end_prefill(one)
        one.next_position += len(delta.tokens)
        if delta.finish is not None:
            self._forget(one)
        return [Deliver(one.request, delta)]

    def _end_prefill(self, one: _Open) -> None:
        one.prefilling = False
        if one.entry == one.decode:
            self._roster.charge(one.entry, tokens=-one.prompt_tokens, requests=0)
        else:
            self._roster.charge(one.entry, tokens=-one.prompt_tokens, requests=-1)

    def _on_failed(self, sender: PeerId, failed: Failed) -> list[Action]:
        one = self._open.get(failed.request)
        if one is None or sender not in one.needed:
            return []
        name = one.entry_name if sender == one.entry else one.decode_name
        tokens = f"after {one.next_position} tokens" if one.next_position else "before the first token"
        text = f"{name} gave up in phase {failed.phase} {tokens}: {failed.text}"
        return self._fail(one, WorkerFailed(failed, text=text), but=sender)

    def on_lost(self, lost: Lost) -> list[Action]:
        """A worker died: everything that needs it ends."""
        actions: list[Action] = []
        for one in [one for one in self._open.values() if lost.peer in one.needed]:
            name = one.entry_name if lost.peer == one.entry else one.decode_name
            actions += self._fail(one, PeerFailed(f"{name} {lost.text} {one.progress}"), but=lost.peer)
        return actions

    def on_unsent(self, peer: PeerId, message: Message) -> list[Action]:
        """A message could not be queued. Only a Generate matters: silence will tell of the rest."""
        one = self._open.get(message.request) if isinstance(message, Generate) else None
        if one is None:
            return []
        return self._fail(one, PeerFailed(f"{one.entry_name} cannot be reached {one.progress}"), but=peer)

    def cancel(self, request: RequestId) -> list[Action]:
        """The client does not want it any more, or has all it wants."""
        one = self._open.get(request)
        if one is None:
            return []
        self._forget(one)
        return list(_cancels(one, but=None))

    def on_tick(self, now_ms: float) -> list[Action]:
        """End what is out of time."""
        actions: list[Action] = []
        for one in [one for one in self._open.values() if now_ms >= one.deadline_ms]:
            text = f"the request's {one.timeout_ms / 1000:g} s were over {one.progress} ({one.decode_name})"
            actions += self._fail(one, DeadlineExceeded(text))
        return actions

    def _fail(self, one: _Open, error: ServingError, *, but: PeerId | None = None) -> list[Action]:
        self._forget(one)
        return [*_cancels(one, but=but), End(one.request, error)]

    def _forget(self, one: _Open) -> None:
        del self._open[one.request]
        if one.prefilling:
            self._end_prefill(one)
        self._roster.charge(one.decode, tokens=0, requests=-1)


def _cancels(one: _Open, *, but: PeerId | None) -> Iterator[Send]:
    """One Cancel to each worker the request was given to, except `but`, which gave it up or is dead."""
    for peer in dict.fromkeys((one.entry, one.decode)):
        if peer != but:
            yield Send(peer, Cancel(request=one.request))


def _without_first(delta: TokenDelta, n_tokens: int) -> TokenDelta:
    """`delta` without its first tokens; an empty rest starts where `delta` ends."""
    return TokenDelta(
        request=delta.request,
        position=delta.position + min(n_tokens, len(delta.tokens)),
        tokens=delta.tokens[n_tokens:],
        finish=delta.finish,
        logprobs=delta.logprobs[n_tokens:],
        cached_tokens=delta.cached_tokens,
        timings=delta.timings,
    )
