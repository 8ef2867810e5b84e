"""One open hand-over of the prefill side: what was granted, copied and said so far."""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from common.errors import KvCorrupt
from common.ids import PeerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.handover import Grant, GrantRequest, HandOver, KvSent, KvSpan
from common.messages.requests import Timings, TokenLogprob
from common.policy.transfer import Granularity
from kvstore.handover.actions import PostCopy, SenderAction
from kvstore.handover.coverage import Coverage
from kvstore.handover.spans import clip, cut, granted_pages, n_pages
from kvstore.handover.states import SenderState


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """What the computed prompt yields; travels with the hand-over."""

    token: int
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    """`grant_wait_ms` and `transfer_ms` are set by the hand-over; the rest is the caller's."""


@dataclass(frozen=True, slots=True)
class Way:
    """What the caller knows of how a transfer is best copied."""

    mode: Granularity = Granularity.LAYER
    pages_last: bool = True
    """The source pages stay as they are until Release; else they are used again once they are copied, so that nothing can
    be sent again."""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """In what pieces a transfer is copied."""

    layers: int
    way: Way
    max_pages: int
    """Of one copy, if a block is not larger."""

    @property
    def max_pages_in_flight(self) -> int:
        """Above this no copy is posted, so that transfers take turns and one that is stopped has soon stopped."""
        return 4 * self.max_pages


class Outgoing:
    """Owned by one Sender, which alone changes `state` and the deadlines."""

    __slots__ = (
        "_backlog",
        "_computed",
        "_pages_in_flight",
        "_plan",
        "_posted_whole",
        "answered_at_ms",
        "commit_by_ms",
        "coverage",
        "deadline_ms",
        "farewell",
        "finished_at_ms",
        "first_token",
        "grant",
        "granted_at_ms",
        "handover",
        "in_flight",
        "n_blocks",
        "repeat_at_ms",
        "request",
        "state",
        "to",
        "unanswered",
    )

    def __init__(
        self, to: PeerId, request: GrantRequest, n_blocks: int, plan: CopyPlan, now_ms: float, deadline_ms: float
    ) -> None:
        self.to, self.request, self.n_blocks, self._plan = to, request, n_blocks, plan
        self.state = SenderState.ASKING
        self.answered_at_ms = self.finished_at_ms = self.repeat_at_ms = now_ms
        self.unanswered = 0  # how often it was said again since the last answer
        self.deadline_ms = self.commit_by_ms = deadline_ms
        self.grant: Grant | None = None
        self.granted_at_ms = now_ms
        self._computed = Coverage(plan.layers, 0, n_blocks)
        self._backlog: deque[KvSpan] = deque()  # to be copied, once it is granted and the copier has room
        self._posted_whole = False
        self.coverage = Coverage(0, 0, 0)
        self.in_flight = self._pages_in_flight = 0
        self.first_token: FirstToken | None = None
        self.handover: HandOver | None = None
        self.farewell: Message | None = None  # told to the decode worker once nothing is in flight

    @property
    def mode(self) -> Granularity:
        """In what pieces it is copied."""
        return self._plan.way.mode

    @property
    def copies_left(self) -> bool:
        """True while a copy is in flight or waits for its turn."""
        return self.in_flight > 0 or bool(self._backlog)

    @property
    def phase(self) -> str:
        """In the words of messages.requests.Failed."""
        if self.state is SenderState.ASKING:
            return "grant"
        return "prefill" if self.first_token is None else "transfer"

    def failed_in(self, code: str) -> str:
        """The phase to name for this failure: pages went wrong on their way, wherever the prompt is."""
        return "transfer" if code == KvCorrupt.code else self.phase

    @property
    def granted(self) -> Grant:
        """The grant, in states that have one."""
        assert self.grant is not None, f"{self.state.value} without a grant"
        return self.grant

    def note_answer(self, now_ms: float) -> None:
        """The decode worker said something about this transfer."""
        self.answered_at_ms, self.unanswered = now_ms, 0

    def tell_unanswered(self, now_ms: float) -> str:
        """Why a request for pages is given up that nobody answers."""
        silent_s = (now_ms - self.answered_at_ms) / 1_000
        return f"decode worker {self.to} did not answer for {silent_s:.0f} s, in which it was asked for pages again and again"

    def fits(self, grant: Grant) -> bool:
        """True if the grant has a page for every block of every layer that it asks to be sent."""
        missing_blocks = self.n_blocks - grant.first_block
        return len(grant.pages) == self._plan.layers and all(len(row) == missing_blocks for row in grant.pages)

    def accept(self, grant: Grant, now_ms: float) -> None:
        """Take a grant that fits."""
        self.grant, self.granted_at_ms = grant, now_ms
        self.coverage = Coverage(self._plan.layers, grant.first_block, self.n_blocks)

    def add_computed(self, span: KvSpan) -> None:
        """K and V of a span are in the source pages, maybe anew. Raises ValueError if it is none of this transfer."""
        if not self._computed.fits(span):
            raise ValueError(f"{span} lies outside the {self.n_blocks} blocks of transfer {self.request.transfer}")
        self._computed.add(span)
        if self.mode is Granularity.LAYER and span not in self._backlog:
            self._backlog.append(span)

    def post(self) -> list[SenderAction]:
        """Start what can be copied now: of what the decode worker lacks, as much as may be in flight."""
        if self.grant is None:
            return []
        if self.mode is not Granularity.LAYER and self.first_token is not None and not self._posted_whole:
            self._posted_whole = True
            self._backlog.extend(self._whole_if_computed(self.grant))
        actions: list[SenderAction] = []
        while self._backlog and self._pages_in_flight < self._plan.max_pages_in_flight:
            lacking = clip(self._backlog.popleft(), self.grant.first_block)
            if lacking is None:
                continue
            part = cut(lacking, self._plan.max_pages)
            if part.rest is not None:
                self._backlog.appendleft(part.rest)
            self.in_flight += 1
            self._pages_in_flight += n_pages(part.piece)
            pages = granted_pages(self.grant, part.piece)
            actions.append(PostCopy(self.grant.transfer, self.to, part.piece, pages))
        return actions

    def end_copy(self, span: KvSpan) -> None:
        """A copy of this span is not in flight any more."""
        self.in_flight -= 1
        self._pages_in_flight -= n_pages(span)

    def _whole(self, grant: Grant) -> list[KvSpan]:
        """All that was granted, in the pieces of the mode."""
        first, layers = grant.first_block, self._plan.layers
        if first == self.n_blocks:
            return []
        if self.mode is Granularity.AGGREGATED:
            return [KvSpan(0, first, self.n_blocks - first, layers)]
        return [KvSpan(layer, first, self.n_blocks - first) for layer in range(layers)]

    def _whole_if_computed(self, grant: Grant) -> list[KvSpan]:
        whole = self._whole(grant)
        if any(self._computed.lacks(span) for span in whole):
            raise ValueError(f"transfer {grant.transfer} is finished, but some of its blocks were never computed")
        return whole

    def compose_handover(self, now_ms: float) -> HandOver:
        """The last message, once everything is copied. Raises ValueError if something was never computed."""
        first, grant = self.first_token, self.granted
        if first is None or not self.coverage.complete:
            raise ValueError(f"transfer {grant.transfer} is finished, but some of its blocks were never computed")
        # A grant that comes while the prompt is computed has cost nothing: only what it added is waiting.
        begun_ms = max(self.finished_at_ms, self.granted_at_ms)
        timings = msgspec.structs.replace(
            first.timings, grant_wait_ms=begun_ms - self.finished_at_ms, transfer_ms=now_ms - begun_ms
        )
        self.handover = HandOver(
            transfer=grant.transfer,
            epoch=grant.epoch,
            first_token=first.token,
            logprob=first.logprob,
            cached_tokens=first.cached_tokens,
            timings=timings,
        )
        return self.handover

    def say_again(self, now_ms: float) -> list[SenderAction]:
        """Repeat what may have been lost: the request for pages, or all of the content that is still here."""
        self.unanswered += 1
        if self.handover is None:
            left_ms = max(1, int(self.deadline_ms - now_ms))
            return [Send(self.to, msgspec.structs.replace(self.request, timeout_ms=left_ms))]
        grant, actions, whole = self.granted, list[SenderAction](), self._whole(self.granted)
        if self.request.transport != "tcp":
            # Only announced again, never written again: the pages may be the running request's by now.
            actions.append(Send(self.to, KvSent(transfer=grant.transfer, epoch=grant.epoch, spans=tuple(whole))))
        elif self._plan.way.pages_last and not self.copies_left:
            self._backlog.extend(whole)
            actions += self.post()
        return [*actions, Send(self.to, self.handover)]
