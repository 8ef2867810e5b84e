"""One open hand-over of the prefill side: what was granted, copied and said so far."""

from dataclasses import dataclass, field

import msgspec

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.handover import Grant, GrantRequest, HandOver, KvSent, KvSpan
from common.messages.requests import Timings, TokenLogprob
from kvstore.handover.actions import PostCopy, SenderAction
from kvstore.handover.coverage import Coverage
from kvstore.handover.states import SenderState


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """What the computed prompt yields; travels with the hand-over."""

    token: int
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    """`grant_wait_ms` and `transfer_ms` are set by the hand-over; the rest is the caller's."""


class Outgoing:
    """Owned by one Sender, which alone changes `state` and the deadlines."""

    __slots__ = (
        "_layers",
        "asked_at_ms",
        "commit_by_ms",
        "coverage",
        "deadline_ms",
        "farewell",
        "finished_at_ms",
        "first_token",
        "grant",
        "grant_wait_ms",
        "handover",
        "in_flight",
        "n_blocks",
        "repeat_at_ms",
        "request",
        "state",
        "to",
        "waiting",
    )

    def __init__(
        self, to: PeerId, request: GrantRequest, n_blocks: int, layers: int, now_ms: float, deadline_ms: float
    ) -> None:
        self.to, self.request, self.n_blocks, self._layers = to, request, n_blocks, layers
        self.state = SenderState.ASKING
        self.asked_at_ms = self.finished_at_ms = self.repeat_at_ms = now_ms
        self.deadline_ms = self.commit_by_ms = deadline_ms
        self.grant: Grant | None = None
        self.grant_wait_ms = 0.0
        self.waiting: list[KvSpan] = []  # computed before the grant came
        self.coverage = Coverage(0, 0, 0)
        self.in_flight = 0
        self.first_token: FirstToken | None = None
        self.handover: HandOver | None = None
        self.farewell: Message | None = None  # told to the decode worker once nothing is in flight

    @property
    def phase(self) -> str:
        """In the words of messages.requests.Failed."""
        if self.state is SenderState.ASKING:
            return "grant"
        return "prefill" if self.first_token is None else "transfer"

    @property
    def granted(self) -> Grant:
        """The grant, in states that have one."""
        assert self.grant is not None, f"{self.state.value} without a grant"
        return self.grant

    def fits(self, grant: Grant) -> bool:
        """True if the grant has a page for every block of every layer that it asks to be sent."""
        missing_blocks = self.n_blocks - grant.first_block
        return len(grant.pages) == self._layers and all(len(row) == missing_blocks for row in grant.pages)

    def accept(self, grant: Grant, now_ms: float) -> None:
        """Take a grant that fits."""
        self.grant, self.grant_wait_ms = grant, now_ms - self.asked_at_ms
        self.coverage = Coverage(self._layers, grant.first_block, self.n_blocks)

    def post(self, span: KvSpan) -> list[SenderAction]:
        """Start copying what the decode worker lacks of `span`."""
        grant = self.granted
        first = max(span.first_block, grant.first_block)
        n_blocks = span.first_block + span.n_blocks - first
        if n_blocks <= 0:
            return []
        needed = KvSpan(span.layer, first, n_blocks)
        if not self.coverage.fits(needed):
            raise ValueError(f"{span} lies outside the {self.n_blocks} blocks of transfer {grant.transfer}")
        place = first - grant.first_block
        self.in_flight += 1
        return [PostCopy(grant.transfer, self.to, needed, grant.pages[span.layer][place : place + n_blocks])]

    def compose_handover(self, now_ms: float) -> HandOver:
        """The last message, once everything is copied. Raises ValueError if something was never computed."""
        first, grant = self.first_token, self.granted
        if first is None or not self.coverage.complete:
            raise ValueError(f"transfer {grant.transfer} is finished, but some of its blocks were never computed")
        timings = msgspec.structs.replace(
            first.timings, grant_wait_ms=self.grant_wait_ms, transfer_ms=now_ms - self.finished_at_ms
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
        """Repeat what may have been lost: the request for pages, or all of the content."""
        if self.handover is None:
            left_ms = max(1, int(self.deadline_ms - now_ms))
            return [Send(self.to, msgspec.structs.replace(self.request, timeout_ms=left_ms))]
        grant, actions = self.granted, list[SenderAction]()
        n_blocks = self.n_blocks - grant.first_block
        spans = tuple(KvSpan(layer, grant.first_block, n_blocks) for layer in range(self._layers if n_blocks else 0))
        if self.request.transport != "tcp":
            # Only announced again, never written again: the pages may be the running request's by now.
            actions.append(Send(self.to, KvSent(transfer=grant.transfer, epoch=grant.epoch, spans=spans)))
        elif self.in_flight == 0:
            for span in spans:
                actions += self.post(span)
        return [*actions, Send(self.to, self.handover)]
