"""Prefill side of every hand-over, without sockets, clocks or memory.

Owns `_open`: every hand-over that was asked for and may still read source pages. An entry leaves when it has ended
(Commit, refusal, Stop, cancel, deadline, death of the decode worker) and no copy of it is in flight; then, and only
then, its source pages are released and the decode worker is told that nothing writes any more. Each has the
request's deadline; waiting for Commit has one of its own; copies in flight always come back from the copier. Pages are
waited for while the decode worker says that the transfer is in its queue: repeats that it does not answer are counted.
"""

from common.errors import ProtocolViolation
from common.ids import PeerId, TransferId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.handover import (
    Abort,
    Commit,
    Grant,
    GrantPending,
    GrantRefused,
    GrantRequest,
    KvSent,
    KvSpan,
    Renew,
    Stop,
    Stopped,
)
from kvstore.handover.actions import GaveUp, Granted, HandedOver, Release, SenderAction
from kvstore.handover.outgoing import CopyPlan, FirstToken, Outgoing, Way
from kvstore.handover.states import SENDER, SenderEvent, SenderState, advance

_BY_LAYER = Way()
_WRITING = (SenderState.FILLING, SenderState.HANDING_OVER)


class Sender:
    """Decides; never performs. Every method returns what the shell must now do, in order."""

    def __init__(
        self,
        layers: int,
        *,
        repeat_ms: float = 2_000.0,
        commit_wait_ms: float = 8_000.0,
        renew_ms: float = 5_000.0,
        max_unanswered: int = 5,
        max_copy_pages: int = 256,
    ) -> None:
        """`repeat_ms`: between two GrantRequests or HandOvers. `commit_wait_ms`: after it, the receiver has failed.
        `renew_ms`: leases are renewed at least so often.

        `max_unanswered`: after so many unanswered repeats of a GrantRequest in a row, the receiver has failed. Not a time:
        who was stopped himself has not asked. `max_copy_pages`: larger spans are copied, and announced, in pieces of blocks.
        """
        self._layers, self._max_copy_pages, self._max_unanswered = layers, max_copy_pages, max_unanswered
        self._repeat_ms, self._commit_wait_ms, self._renew_ms = repeat_ms, commit_wait_ms, renew_ms
        self._renew_at_ms: float | None = None
        self._open: dict[TransferId, Outgoing] = {}

    @property
    def open_transfers(self) -> list[TransferId]:
        """Whose source pages are not released yet, oldest first."""
        return list(self._open)

    def state_of(self, transfer: TransferId) -> SenderState | None:
        """State of an open transfer; None if it is closed or unknown."""
        outgoing = self._open.get(transfer)
        return None if outgoing is None else outgoing.state

    def commit_by_ms_of(self, transfer: TransferId) -> float | None:
        """Until when Commit is waited for; None before HandOver, and once the transfer has ended."""
        outgoing = self._open.get(transfer)
        handed = outgoing is not None and outgoing.state is SenderState.HANDING_OVER
        return outgoing.commit_by_ms if outgoing is not None and handed else None

    def ask(
        self,
        to: PeerId,
        request: GrantRequest,
        n_blocks: int,
        now_ms: float,
        deadline_ms: float,
        way: Way = _BY_LAYER,
    ) -> list[SenderAction]:
        """Ask a decode worker for pages for `n_blocks` token blocks. A transfer id is used once, ever."""
        if request.transfer in self._open:
            raise ValueError(f"transfer {request.transfer} was asked for already")
        plan = CopyPlan(self._layers, way, self._max_copy_pages)
        outgoing = Outgoing(to, request, n_blocks, plan, now_ms, deadline_ms)
        outgoing.repeat_at_ms = now_ms + self._repeat_ms
        self._open[request.transfer] = outgoing
        return [Send(to, request)]

    def computed(self, transfer: TransferId, span: KvSpan) -> list[SenderAction]:
        """K and V of a span, of one layer or several, are in the source pages. Ignored once the transfer has ended.

        Said again after they were computed anew, before `finished`: then they are copied again.
        """
        outgoing = self._open.get(transfer)
        if outgoing is None or outgoing.state is SenderState.DRAINING:
            return []
        if outgoing.first_token is not None:
            raise ValueError(f"transfer {transfer} was finished before {span}: its pages may be the running request's")
        outgoing.add_computed(span)
        return outgoing.post()

    def copied(self, transfer: TransferId, span: KvSpan, now_ms: float, *, ok: bool = True) -> list[SenderAction]:
        """A copy ended: every PostCopy is answered by exactly one of these calls, also when it failed."""
        outgoing = self._open.get(transfer)
        if outgoing is None or outgoing.in_flight == 0:
            raise ValueError(f"transfer {transfer} has no copy in flight")
        outgoing.end_copy(span)
        outgoing.state = advance(SENDER, outgoing.state, SenderEvent.COPY)
        if outgoing.state is SenderState.DRAINING:
            return self._close(transfer, outgoing, SenderEvent.DRAINED) if outgoing.in_flight == 0 else []
        if not ok:
            text = f"copying {span} to {outgoing.to} failed"
            return self._give_up(transfer, outgoing, "peer_failed", text, Abort(transfer=transfer, code="copy_failed"))
        outgoing.coverage.add(span)
        sent = KvSent(transfer=transfer, epoch=outgoing.granted.epoch, spans=(span,))
        return [Send(outgoing.to, sent), *outgoing.post(), *self._hand_over_if_complete(outgoing, now_ms)]

    def finished(self, transfer: TransferId, first_token: FirstToken, now_ms: float) -> list[SenderAction]:
        """The whole prompt is computed. HandOver goes out when the grant is here and every copy done."""
        outgoing = self._open.get(transfer)
        if outgoing is None or outgoing.state is SenderState.DRAINING:
            return []
        outgoing.first_token, outgoing.finished_at_ms = first_token, now_ms
        return [*outgoing.post(), *self._hand_over_if_complete(outgoing, now_ms)]

    def cancel(self, transfer: TransferId, code: str, now_ms: float) -> list[SenderAction]:
        """Give a transfer up on this side; says Abort and releases when no copy is in flight. Unknown: ignored."""
        outgoing = self._open.get(transfer)
        if outgoing is None or outgoing.state is SenderState.DRAINING:
            return []
        return self._end(transfer, outgoing, Abort(transfer=transfer, code=code))

    def on_message(self, sender: PeerId, message: AnyMessage, now_ms: float) -> list[SenderAction]:
        """Handle one message from a decode worker. Raises ProtocolViolation for one that never belongs here."""
        match message:
            case Grant() | GrantPending() | GrantRefused() | Commit() | Stop():
                outgoing = self._open.get(message.transfer)
            case _:
                raise ProtocolViolation(f"prefill worker got {type(message).__name__} from {sender}")
        if outgoing is None or outgoing.to != sender:
            return _late(sender, message)
        outgoing.note_answer(now_ms)
        match message:
            case GrantPending():
                return []
            case Grant():
                return self._on_grant(outgoing, message, now_ms)
            case GrantRefused(code=code, text=text, retryable=retryable):
                if outgoing.state is not SenderState.ASKING:
                    return []
                gave_up = GaveUp(message.transfer, "grant", code, text, retryable)
                return [gave_up, *self._end(message.transfer, outgoing, None)]
            case Commit():
                if outgoing.state is not SenderState.HANDING_OVER:
                    return []
                return [HandedOver(message.transfer), *self._end(message.transfer, outgoing, None)]
            case Stop(code=code):
                return self._on_stop(outgoing, message.transfer, code)

    def on_peer_dead(self, peer: PeerId) -> list[SenderAction]:
        """A decode worker died or fell silent: nothing of it will be answered."""
        actions: list[SenderAction] = []
        for transfer, outgoing in list(self._open.items()):
            if outgoing.to != peer:
                continue
            if outgoing.state is SenderState.DRAINING:
                continue  # its farewell goes nowhere, or reaches a peer that was only silent and waits for it
            abort = Abort(transfer=transfer, code="peer_failed")
            actions += self._give_up(transfer, outgoing, "peer_failed", f"decode worker {peer} died", abort)
        return actions

    def on_tick(self, now_ms: float) -> list[SenderAction]:
        """Act on every deadline that has passed; renew leases."""
        actions: list[SenderAction] = []
        for transfer, outgoing in list(self._open.items()):
            if outgoing.state is SenderState.DRAINING:
                continue
            if now_ms >= outgoing.deadline_ms:
                text = f"the request's time was up in phase {outgoing.phase}"
                abort = Abort(transfer=transfer, code="deadline_exceeded")
                actions += self._give_up(transfer, outgoing, "deadline_exceeded", text, abort, retryable=False)
            elif outgoing.state is SenderState.HANDING_OVER and now_ms >= outgoing.commit_by_ms:
                text = f"decode worker {outgoing.to} did not commit within {self._commit_wait_ms:.0f} ms"
                abort = Abort(transfer=transfer, code="no_commit")
                actions += self._give_up(transfer, outgoing, "peer_failed", text, abort)
            elif now_ms >= outgoing.repeat_at_ms and outgoing.state is not SenderState.FILLING:
                actions += self._say_again(transfer, outgoing, now_ms)
        return actions + self._renew(now_ms)

    def check(self) -> None:
        """Raise RuntimeError if an entry should have left."""
        for transfer, outgoing in self._open.items():
            drained = outgoing.state is SenderState.DRAINING and outgoing.in_flight == 0
            early = outgoing.state is SenderState.ASKING and outgoing.in_flight > 0
            if drained or early or outgoing.state is SenderState.CLOSED:
                raise RuntimeError(
                    f"transfer {transfer} is {outgoing.state.value} with {outgoing.in_flight} copies in flight"
                )

    def _say_again(self, transfer: TransferId, outgoing: Outgoing, now_ms: float) -> list[SenderAction]:
        if outgoing.state is SenderState.ASKING and outgoing.unanswered >= self._max_unanswered:
            abort = Abort(transfer=transfer, code="peer_failed")
            gave_up = GaveUp(transfer, "grant", "peer_failed", outgoing.tell_unanswered(now_ms), True, unanswered=True)
            return [gave_up, *self._end(transfer, outgoing, abort)]
        outgoing.repeat_at_ms = now_ms + self._repeat_ms
        return outgoing.say_again(now_ms)

    def _on_grant(self, outgoing: Outgoing, grant: Grant, now_ms: float) -> list[SenderAction]:
        transfer = grant.transfer
        if outgoing.state is not SenderState.ASKING:
            return []  # a repeat
        if not outgoing.fits(grant):
            text = f"decode worker {outgoing.to} granted pages of another shape than asked for"
            abort = Abort(transfer=transfer, code="protocol_violation")
            return self._give_up(transfer, outgoing, "protocol_violation", text, abort)
        outgoing.state = advance(SENDER, outgoing.state, SenderEvent.GRANT)
        outgoing.accept(grant, now_ms)
        due_ms = now_ms + self._renew_within_ms(grant)
        self._renew_at_ms = due_ms if self._renew_at_ms is None else min(self._renew_at_ms, due_ms)
        granted = Granted(transfer, grant.first_block)
        return [granted, *outgoing.post(), *self._hand_over_if_complete(outgoing, now_ms)]

    def _on_stop(self, outgoing: Outgoing, transfer: TransferId, code: str) -> list[SenderAction]:
        stopped = Stopped(transfer=transfer)
        if outgoing.state is SenderState.DRAINING:
            outgoing.farewell = outgoing.farewell or stopped
            return []
        text = f"decode worker {outgoing.to} stopped the transfer: {code}"
        return self._give_up(transfer, outgoing, code, text, stopped, retryable=code != "cancelled")

    def _hand_over_if_complete(self, outgoing: Outgoing, now_ms: float) -> list[SenderAction]:
        if outgoing.state is not SenderState.FILLING or outgoing.first_token is None or outgoing.copies_left:
            return []
        handover = outgoing.compose_handover(now_ms)
        outgoing.state = advance(SENDER, outgoing.state, SenderEvent.ALL_SENT)
        outgoing.commit_by_ms = now_ms + self._commit_wait_ms
        outgoing.repeat_at_ms = now_ms + self._repeat_ms
        return [Send(outgoing.to, handover)]

    def _renew(self, now_ms: float) -> list[SenderAction]:
        if self._renew_at_ms is None or now_ms < self._renew_at_ms:
            return []
        by_peer: dict[PeerId, list[TransferId]] = {}
        within_ms: list[float] = []
        for transfer, outgoing in self._open.items():
            if outgoing.grant is not None and (outgoing.state in _WRITING or outgoing.farewell is not None):
                by_peer.setdefault(outgoing.to, []).append(transfer)
                within_ms.append(self._renew_within_ms(outgoing.grant))
        self._renew_at_ms = now_ms + min(within_ms) if within_ms else None
        return [Send(peer, Renew(transfers=tuple(transfers))) for peer, transfers in by_peer.items()]

    def _renew_within_ms(self, grant: Grant) -> float:
        """Two Renews may be lost before the lease ends."""
        return min(self._renew_ms, grant.lease_ms / 3)

    def _give_up(
        self,
        transfer: TransferId,
        outgoing: Outgoing,
        code: str,
        text: str,
        farewell: Message,
        *,
        retryable: bool = True,
    ) -> list[SenderAction]:
        gave_up = GaveUp(transfer, outgoing.failed_in(code), code, text, retryable)
        return [gave_up, *self._end(transfer, outgoing, farewell)]

    def _end(self, transfer: TransferId, outgoing: Outgoing, farewell: Message | None) -> list[SenderAction]:
        outgoing.farewell = farewell
        if outgoing.in_flight:
            outgoing.state = advance(SENDER, outgoing.state, SenderEvent.END_IN_FLIGHT)
            return []
        return self._close(transfer, outgoing, SenderEvent.END)

    def _close(self, transfer: TransferId, outgoing: Outgoing, event: SenderEvent) -> list[SenderAction]:
        outgoing.state = advance(SENDER, outgoing.state, event)
        del self._open[transfer]
        told: list[SenderAction] = [] if outgoing.farewell is None else [Send(outgoing.to, outgoing.farewell)]
        return [*told, Release(transfer)]


def _late(sender: PeerId, message: Grant | GrantPending | GrantRefused | Commit | Stop) -> list[SenderAction]:
    """Nothing of a closed transfer is in flight; a peer that waits for that news gets it."""
    match message:
        case Grant(transfer=transfer) | GrantPending(transfer=transfer):
            return [Send(sender, Abort(transfer=transfer, code="closed"))]
        case Stop(transfer=transfer):
            return [Send(sender, Stopped(transfer=transfer))]
        case _:
            return []
