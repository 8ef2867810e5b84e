"""Every request of one gateway, from its arrival to its end, without sockets or clocks.

Owns `_open`: each request that was given to workers or will be again soon, with its deadline and the tokens that its
client has; the Entrance owns those that wait for a place. An entry leaves in one of four ways: its last token, an
error that no other worker can heal, its deadline, or the client's cancel. Every way out releases what was charged.

    waiting --a place is free--> attempt --first token--> attempt --last token--> over
                                    |  ^                     |
                       Failed, dead v  | backoff             | the same: prompt and emitted tokens are replayed
                                   pause <-------------------+
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import DeadlineExceeded, NoWorker, OutOfPages, PeerFailed, ServingError
from common.ids import PeerId, RequestId, WorkerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.requests import Cancel, Failed, Generate, NotHere, StillHere, TokenDelta, Tokens
from gateway.core.actions import Action, Begun, Deliver, End
from gateway.core.attempts import Attempts
from gateway.core.entrance import Entrance
from gateway.core.failure import Setback, WorkerFailed, is_workers_fault
from gateway.core.keys import KeyLimits
from gateway.core.open_request import Attempt, OpenRequest
from gateway.core.order import Order
from gateway.core.placement import Placement
from gateway.core.recovery import Retries
from gateway.core.roster import Lost, Roster
from gateway.core.terms import Terms
from gateway.core.totals import RoutingTotals

News = Tokens | Failed | StillHere | NotHere
_LOOK_AGAIN_MS = 100.0
_AGAIN_PER_TICK = 64  # a death takes many requests down together; tokens of others must pass in between


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What Inflight is made of; each part owns its own state."""

    roster: Roster
    placement: Placement
    keys: KeyLimits
    totals: RoutingTotals
    draw: Callable[[], float]
    """A random number from 0 to 1, for the jitter of retries."""


class Inflight:
    """Decides; never performs."""

    def __init__(self, parts: Parts, terms: Terms) -> None:
        self._roster = parts.roster
        self._totals, self._terms = parts.totals, terms
        self._retries = Retries(terms.retry, parts.totals, parts.draw)
        self._entrance = Entrance(parts.keys, parts.totals, terms, parts.placement.retry_after_s)
        self._open: dict[RequestId, OpenRequest] = {}
        self._attempts = Attempts(parts.roster, parts.placement)
        self.repeated_tokens_total = 0

    def __len__(self) -> int:
        """Requests without an answer yet."""
        return len(self._open) + len(self._entrance)

    def __iter__(self) -> Iterator[OpenRequest]:
        """The same requests, to read."""
        return iter([*self._open.values(), *self._entrance])

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._entrance)

    @property
    def n_unanswered_cancels(self) -> int:
        """Cancels that may still be said again."""
        return self._attempts.n_unanswered_cancels

    def submit(self, orders: Sequence[Order], now_ms: float) -> list[Action]:
        """Place the prompts of one HTTP request, or let them wait for places.

        Raises Busy, RateLimited, NoWorker or InvalidRequest, and then holds none of them; later ones of a batch for which
        there is no place after all end one by one.
        """
        actions: list[Action] = []
        for index, one in enumerate(self._entrance.admit(orders, now_ms)):
            self._retries.on_request()
            try:
                actions += self._enter(one, now_ms)
            except ServingError as error:
                if index == 0:
                    self._entrance.refund(orders)
                    raise
                self._entrance.leave(one)
                actions.append(End(one.request, error))
        return actions

    def _enter(self, one: OpenRequest, now_ms: float) -> list[Action]:
        if len(self._open) < self._terms.max_open and not self._entrance:
            return self._begin(one, now_ms)
        return self._entrance.wait(one, len(self._open), now_ms) + self._fill(now_ms)

    def _fill(self, now_ms: float) -> list[Action]:
        """Give free places to those who wait. While nobody can take them they go on waiting, as long as they may."""
        actions: list[Action] = []
        while len(self._open) < self._terms.max_open and (one := self._entrance.first()) is not None:
            try:
                actions += self._begin(one, now_ms)
            except NoWorker:
                break
            except ServingError as error:
                self._entrance.leave(one)
                actions.append(End(one.request, error))
            self._entrance.started(one)
        return actions

    def _begin(self, one: OpenRequest, now_ms: float) -> list[Action]:
        """Send it to workers. Raises NoWorker, and then changes nothing."""
        try:
            actions = self._attempts.begin(one, now_ms)
        except ServingError as error:
            raise error.in_phase("route") from None
        self._open[one.request] = one
        return actions

    def begun(self, wire: RequestId) -> Begun | None:
        """The attempt of that name on the wire, if it goes on."""
        return self._attempts.begun(wire)

    def phase_of(self, request: RequestId) -> str:
        """Where a request is."""
        one = self._open.get(request)
        return "queue" if one is None else one.phase

    def on_message(self, sender: PeerId, message: News, now_ms: float) -> list[Action]:
        """News of requests. What is said about requests of others, or by others, changes nothing."""
        if isinstance(message, Failed):
            return self._on_failed(sender, message, now_ms)
        if isinstance(message, NotHere):
            return [a for wire in message.requests for a in self._on_not_here(sender, wire, now_ms)]
        if isinstance(message, StillHere):
            self._attempts.still_here(sender, message.requests)
            return []
        actions: list[Action] = []
        for delta in message.deltas:
            one = self._attempts.get(delta.request)
            if one is None or one.attempt is None:
                # Given up here, and the Cancel is still under way or was lost with a connection: say it again.
                if delta.finish is None:
                    actions.append(Send(sender, Cancel(request=delta.request)))
            elif one.attempt.decode == sender:
                actions += self._on_delta(one, one.attempt, delta, now_ms)
        return actions

    def _on_not_here(self, sender: PeerId, wire: RequestId, now_ms: float) -> list[Action]:
        lost, asked = self._attempts.not_here(sender, wire, now_ms)
        if lost is None:
            return asked
        self._totals.add("lost_attempts_total")
        error = PeerFailed(f"a message of it was lost: {sender} does not know it {lost.progress}")
        return self._retry(lost, Setback(error, by=sender), now_ms)

    def _on_delta(self, one: OpenRequest, attempt: Attempt, delta: TokenDelta, now_ms: float) -> list[Action]:
        missing = delta.position - len(one.emitted)
        if missing > 0:
            self._attempts.end_prefill(attempt)  # its first token was drawn, and is among them
            text = f"{attempt.placed.decode_name} skipped {missing} tokens {one.progress}"
            return self._retry(one, Setback(PeerFailed(text), frozenset({attempt.placed.decode_worker})), now_ms)
        if missing < 0:
            self.repeated_tokens_total += min(-missing, len(delta.tokens))
            delta = _without_first(delta, -missing)
            if not delta.tokens and delta.finish is None:
                return []
        if delta.tokens and attempt.prefilling:
            took_ms = now_ms - attempt.sent_ms
            self._totals.on_first_token(attempt.placed, took_ms=took_ms, cached_tokens=delta.cached_tokens)
            self._attempts.end_prefill(attempt)
        if delta.tokens:
            attempt.news_ms, attempt.unanswered = now_ms, 0
            one.emitted += delta.tokens
            one.tries, one.avoid = 1, frozenset()
        deliver = Deliver(one.request, delta)
        if delta.finish is None:
            return [deliver]
        self._roster.on_success(attempt.decode)
        self._forget(one, now_ms, but=attempt.decode)
        return [deliver, *self._fill(now_ms)]

    def _on_failed(self, sender: PeerId, failed: Failed, now_ms: float) -> list[Action]:
        one = self._attempts.get(failed.request)
        if one is None or one.attempt is None or sender not in one.attempt.needed:
            return []
        attempt = one.attempt
        error = _gave_up(one, attempt, sender, failed)
        if is_workers_fault(failed.code):
            self._roster.on_failure(_to_blame(attempt, sender, failed.phase), now_ms)
        avoid = _to_avoid(attempt, sender, failed)
        fits_elsewhere = error.never_fits and self._roster.has_larger(avoid | one.avoid, now_ms)
        if not (failed.retryable or fits_elsewhere):
            return self._fail(one, error, now_ms, but=sender)
        return self._retry(one, Setback(error, avoid, sender), now_ms)

    def on_lost(self, lost: Lost, now_ms: float) -> list[Action]:
        """A worker died: everything that needs it goes elsewhere."""
        actions: list[Action] = []
        for one in self._attempts:
            attempt = one.attempt
            if attempt is None or lost.peer not in attempt.needed:
                continue
            one.deaths += 1
            self._attempts.on_lost(one, lost.peer, now_ms)
            error = PeerFailed(f"{attempt.name_of(lost.peer)} {lost.text} {one.progress}")
            actions += self._retry(one, Setback(error, by=lost.peer, died=True), now_ms)
        return actions

    def on_unsent(self, peer: PeerId, message: Message, now_ms: float) -> list[Action]:
        """A message could not be queued. Only a Generate matters: silence will tell of the rest."""
        if not isinstance(message, Generate):
            return []
        return self._elsewhere(message.request, peer, "cannot be reached", now_ms, by=peer)

    def _elsewhere(self, wire: RequestId, peer: PeerId, text: str, now_ms: float, by: PeerId | None) -> list[Action]:
        one = self._attempts.get(wire)
        if one is None or one.attempt is None:
            return []
        self._roster.on_failure(peer, now_ms)
        phase = one.attempt.phase if peer == one.attempt.entry else "decode"
        error = PeerFailed(f"{one.attempt.name_of(peer)} {text} {one.at(phase)}").in_phase(phase)
        return self._retry(one, Setback(error, frozenset({one.attempt.worker_of(peer)}), by), now_ms)

    def _retry(self, one: OpenRequest, setback: Setback, now_ms: float) -> list[Action]:
        """Pause it until its next attempt, or fail it if it has had its tries."""
        error = setback.error.in_phase(one.phase)
        pause_ms = self._retries.pause_ms(one, died=setback.died)
        if pause_ms is None:
            return self._fail(one, error, now_ms, but=setback.by)
        self._attempts.note_failure(one, error, setback.by, now_ms)
        cancels = self._attempts.end(one, now_ms, but=setback.by)
        one.error, one.failed_ms, one.avoid = error, now_ms, one.avoid | setback.avoid
        one.retry_at_ms = now_ms + pause_ms
        self._totals.add(f"retries_total{{code={error.code},kind={'replay' if one.emitted else 'retry'}}}")
        return cancels

    def _again(self, one: OpenRequest, now_ms: float) -> list[Action]:
        """Its pause is over."""
        assert one.failed_ms is not None and one.error is not None, "only what failed pauses"
        failed_ms, error = one.failed_ms, one.error
        try:
            return self._begin(one, now_ms)
        except NoWorker as nobody:
            if now_ms - failed_ms >= self._terms.retry.wait_ms:
                return self._fail(one, PeerFailed(f"{error}; then {nobody}").in_phase("retry"), now_ms)
            one.retry_at_ms = now_ms + _LOOK_AGAIN_MS
            return []
        except ServingError as refusal:
            return self._fail(one, refusal, now_ms)

    def cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        """The client does not want it any more, or has all it wants."""
        one = self._open.get(request)
        if one is not None:
            return [*self._forget(one, now_ms, but=None), *self._fill(now_ms)]
        self._entrance.cancel(request)
        return []

    def on_tick(self, now_ms: float) -> list[Action]:
        """End what is out of time; try again what has paused."""
        actions, places = self._entrance.end_late(now_ms), _AGAIN_PER_TICK
        for one in list(self._open.values()):
            if now_ms >= one.deadline_ms:
                actions += self._fail(one, _too_late(one, self._terms.timeout_ms), now_ms)
            elif one.retry_at_ms is not None and now_ms >= one.retry_at_ms and places:
                places -= 1
                actions += self._again(one, now_ms)
        for attempt in self._attempts.unanswered(now_ms):
            self._totals.add("unanswered_attempts_total")
            actions += self._elsewhere(attempt.wire, attempt.knower, "answers nothing about it", now_ms, by=None)
        return actions + self._attempts.questions(now_ms) + self._fill(now_ms)

    def _fail(self, one: OpenRequest, error: ServingError, now_ms: float, *, but: PeerId | None = None) -> list[Action]:
        if error.http_status == 503:
            self._totals.add("shed_total{reason=workers-busy}")
        error.attempts = one.attempts_total
        return [*self._forget(one, now_ms, but=but), End(one.request, error), *self._fill(now_ms)]

    def _forget(self, one: OpenRequest, now_ms: float, *, but: PeerId | None) -> list[Action]:
        cancels = self._attempts.end(one, now_ms, but=but)
        del self._open[one.request]
        self._entrance.leave(one)
        return cancels

    def check(self) -> None:
        """Keys and workers are charged with just what is here, and everything goes on. Raises AssertionError with tables."""
        pausing = [one for one in self._open.values() if one.attempt is None]
        assert all(one.retry_at_ms is not None for one in pausing), pausing
        assert len(self._attempts) + len(pausing) == len(self._open) <= self._terms.max_open
        self._entrance.check(self._open.values())
        self._attempts.check()


def _gave_up(one: OpenRequest, attempt: Attempt, sender: PeerId, failed: Failed) -> WorkerFailed:
    text = f"{attempt.name_of(sender)} gave up {one.at(failed.phase)}: {failed.text}"
    return WorkerFailed(failed, text=text)


def _too_late(one: OpenRequest, timeout_ms: float) -> DeadlineExceeded:
    where = f" ({one.attempt.placed.decode_name})" if one.attempt is not None else f"; last error: {one.error}"
    text = f"the request's {timeout_ms / 1000:g} s were over {one.progress}{where}"
    return DeadlineExceeded(text).in_phase(one.phase)


def _to_avoid(attempt: Attempt, sender: PeerId, failed: Failed) -> frozenset[WorkerId]:
    """Who should not try it again: who failed it, whom an entry worker could not reach, and who is too small for it."""
    if failed.code == OutOfPages.code and not failed.retryable:
        return frozenset({attempt.worker_of(_to_blame(attempt, sender, failed.phase))})
    avoid = {attempt.worker_of(sender)}
    if sender == attempt.entry and failed.code in ("no_worker", "peer_failed"):
        avoid.add(attempt.placed.decode_worker)
    return frozenset(avoid)


def _to_blame(attempt: Attempt, sender: PeerId, phase: str) -> PeerId:
    """Whose fault a failure is: an entry worker that could not hand over speaks of the other side."""
    return attempt.decode if sender == attempt.entry and phase in ("grant", "transfer") else sender


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
