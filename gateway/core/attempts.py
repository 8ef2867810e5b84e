"""Requests as their workers know them: placed, charged, sent, and taken back. Pure.

Owns one entry per attempt, by its name on the wire, from `begin` to `end`. What was charged is released with it. Workers
that may go on with it after that are its Farewells' matter.
"""

from collections.abc import Iterable, Iterator

from common.errors import ServingError
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.requests import AskAbout, Cancel, Generate
from gateway.core.actions import Action, Begun, Routed
from gateway.core.farewells import Farewells, farewell
from gateway.core.open_request import Attempt, FailedAttempt, OpenRequest
from gateway.core.placed import Placed
from gateway.core.placement import Placement
from gateway.core.roster import Roster

ASK_AFTER_MS = 2_000.0
"""Without news. A message that was lost with a connection costs its request no more than this, twice."""
_MOST_UNANSWERED = 5  # a worker that is silent altogether is given up long before
_MOST_ASKED = 256  # in one message; the rest has its turn at the next tick
_MOST_FAILED = 8  # of one request that are remembered


class Attempts:
    """Decides; never performs."""

    def __init__(self, roster: Roster, placement: Placement) -> None:
        self._roster, self._placement = roster, placement
        self._attempts: dict[RequestId, OpenRequest] = {}
        self._farewells = Farewells()

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(list(self._attempts.values()))

    def get(self, wire: RequestId) -> OpenRequest | None:
        """The request that is served under that name now."""
        return self._attempts.get(wire)

    def begun(self, wire: RequestId) -> Begun | None:
        """The attempt of that name, if it goes on."""
        one = self._attempts.get(wire)
        if one is None or one.attempt is None:
            return None
        return Begun(one.request, one.attempt.placed, one.attempt.sent_ms, one.failed)

    def begin(self, one: OpenRequest, now_ms: float) -> list[Action]:
        """Send it to workers. Raises NoWorker, and then changes nothing."""
        order = one.order
        placed = self._placement.place(order, one.emitted, one.avoid, now_ms, again=one.attempts_total > 0)
        one.attempts_total += 1
        one.tries += 1
        wire = order.request if one.attempts_total == 1 else RequestId(f"{order.request}~{one.attempts_total}")
        one.attempt, one.retry_at_ms, one.failed_ms = Attempt(wire, placed, now_ms), None, None
        self._attempts[wire] = one
        tokens = len(order.prompt) + len(one.emitted)
        self._roster.charge(placed.entry, wire, work_ms=placed.work_ms, tokens=tokens, now_ms=now_ms)
        if placed.decode != placed.entry:
            self._roster.promise(placed.decode, wire, tokens=tokens, now_ms=now_ms)
        routed = [Routed(order.request, placed, one.attempts_total)] if order.explain else []
        return [Send(placed.entry, _generate(one, wire, placed, now_ms)), *routed]

    def end_prefill(self, attempt: Attempt) -> None:
        """Its first token was drawn: the entry worker has done its part, and from now on only who draws the answer is charged."""
        if not attempt.prefilling:
            return
        attempt.prefilling = False
        self._roster.on_success(attempt.entry)
        self._roster.computed(attempt.entry, attempt.wire)
        if attempt.entry != attempt.decode:
            self._roster.release(attempt.entry, attempt.wire)
            self._roster.arrived(attempt.decode, attempt.wire)

    def questions(self, now_ms: float) -> list[Action]:
        """Ask about those without news for a while, so many of each worker's at a time; say Cancel again."""
        about: dict[PeerId, list[RequestId]] = {}
        for wire, one in self._attempts.items():
            attempt = one.attempt
            if attempt is not None and now_ms - attempt.news_ms >= ASK_AFTER_MS:
                asked = about.setdefault(attempt.knower, [])
                if len(asked) < _MOST_ASKED:
                    asked.append(wire)
                    attempt.news_ms = now_ms
                    attempt.unanswered += 1
        asked_about: list[Action] = [Send(peer, AskAbout(requests=tuple(wires))) for peer, wires in about.items()]
        return asked_about + self._farewells.on_tick(now_ms, self._roster.knows)

    def unanswered(self, now_ms: float) -> list[Attempt]:
        """Those about which their knower answers nothing, however alive it is: what it says of them is lost."""
        late = [one.attempt for one in self if one.attempt and now_ms - one.attempt.news_ms >= ASK_AFTER_MS]
        return [attempt for attempt in late if attempt.unanswered >= _MOST_UNANSWERED]

    def still_here(self, sender: PeerId, wires: Iterable[RequestId]) -> None:
        """A worker has these. What is over here stays so: it was told, and will be told again."""
        for wire in wires:
            one = self._attempts.get(wire)
            if one is not None and one.attempt is not None and one.attempt.knower == sender:
                one.attempt.unanswered = 0

    def not_here(self, sender: PeerId, wire: RequestId, now_ms: float) -> tuple[OpenRequest | None, list[Action]]:
        """A worker does not know an attempt. First: whose it is, if it is lost; else whom to ask next.

        An entry worker knows a prompt until its decode worker has taken it over; so who is asked after that answer, and does
        not know it either, never got it, or has said its last word of it.
        """
        self._farewells.not_here(sender, wire)
        one = self._attempts.get(wire)
        if one is None or one.attempt is None or one.attempt.knower != sender:
            return None, []
        attempt = one.attempt
        if sender == attempt.decode:
            return one, []
        attempt.left_entry, attempt.news_ms, attempt.unanswered = True, now_ms, 1
        return None, [Send(attempt.decode, AskAbout(requests=(wire,)))]

    def note_failure(self, one: OpenRequest, error: ServingError, by: PeerId | None, now_ms: float) -> None:
        """Keep why an attempt ends that another one follows. `by`: who failed it; None: who should know of it now."""
        attempt = one.attempt
        if attempt is not None:
            worker = attempt.worker_of(attempt.knower if by is None else by)
            phase = error.phase or attempt.phase
            failed = FailedAttempt(error.code, phase, worker, now_ms - attempt.sent_ms)
            one.failed = (*one.failed, failed)[-_MOST_FAILED:]

    def end(self, one: OpenRequest, now_ms: float, *, but: PeerId | None) -> list[Action]:
        """Take it from its workers: a Cancel to each, except `but`, which gave it up, finished it or is dead.

        It is said again to whoever may have work with it.
        """
        attempt, one.attempt = one.attempt, None
        if attempt is None:
            return []
        del self._attempts[attempt.wire]
        peers = dict.fromkeys((attempt.entry, attempt.decode))
        for peer in peers:
            self._roster.release(peer, attempt.wire)
        busy = [peer for peer in dict.fromkeys(attempt.needed) if peer != but]
        self._farewells.expect(busy, attempt.wire, one.deadline_ms, now_ms)
        actions: list[Action] = []
        for peer in peers:
            if peer in busy:
                actions += farewell(peer, (attempt.wire,))
            elif peer != but:
                actions.append(Send(peer, Cancel(request=attempt.wire)))
        return actions

    def on_lost(self, one: OpenRequest, peer: PeerId, now_ms: float) -> None:
        """A worker that an attempt needs is given up. If it was only stopped, it hears when it is back that this is over."""
        if one.attempt is not None:
            self._farewells.expect((peer,), one.attempt.wire, one.deadline_ms, now_ms)

    @property
    def n_unanswered_cancels(self) -> int:
        """Cancels that may still be said again."""
        return len(self._farewells)

    def check(self) -> None:
        """Workers are charged with just what attempts still need of them. Raises AssertionError with the difference."""
        left_ms: dict[PeerId, dict[RequestId, float]] = {}
        for wire, one in self._attempts.items():
            attempt = one.attempt
            assert attempt is not None and attempt.wire == wire, (wire, attempt)
            for peer in attempt.needed:
                computes = attempt.prefilling and peer == attempt.entry
                left_ms.setdefault(peer, {})[wire] = attempt.placed.work_ms if computes else 0.0
        self._roster.check(left_ms)


def _generate(one: OpenRequest, wire: RequestId, placed: Placed, now_ms: float) -> Generate:
    order = one.order
    return Generate(
        request=wire,
        prompt=order.prompt,
        sampling=order.sampling,
        timeout_ms=max(1, round(one.deadline_ms - now_ms)),
        decode=placed.route.decode,
        model=order.model,
        cache_salt=order.cache_salt,
        emitted=tuple(one.emitted),
        fetch=placed.fetch,
        priority=one.priority,
        decode_peer=placed.decode if placed.route.decode is not None else None,
    )
