"""Decode side of every hand-over, without sockets, clocks or memory.

Owns `_open`: every hand-over that holds or awaits pages. An entry leaves in one of three ways: delivered to the
request; released because nobody writes any more (the writer said so, died, never wrote for itself, or was never told of
the pages: no Grant has left); or refused before pages were given. Each has a deadline: the request's own while it waits,
the lease while it fills, or less while its Grant cannot be sent; the next Stop while it is being stopped. Quarantine has
no end but Stopped, Abort or death: time alone proves nothing about a writer.

Owns `_closed`: how transfers ended, for a while, so late messages get the answer that ends the sender's wait. Owns
`_writers`: who maps our memory, as the kernel tells. Nobody else is granted pages to write to: of a writer that maps
nothing no news of its end would ever come, and its pages would stay in quarantine. A sender without a mapping may live:
over tcp it is served as ever, and if it is dead, its silence and its leases tell.
"""

from common.errors import ProtocolViolation
from common.ids import Incarnation, PeerId, TransferId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.handover import (
    Abort,
    Commit,
    Grant,
    GrantPending,
    GrantRefused,
    GrantRequest,
    HandOver,
    KvSent,
    Renew,
    Stop,
    Stopped,
)
from kvstore.handover.actions import Asked, Deliver, Fill, GaveUp, Quarantine, ReceiverAction, Release
from kvstore.handover.coverage import Coverage
from kvstore.handover.spans import granted_pages
from kvstore.handover.states import RECEIVER, ReceiverEvent, ReceiverState, advance

_UNTOLD_MS = 5_000.0
"""How long pages wait for a sender that could not be told of them; it asks again every 2 s."""


class _Incoming:
    """One open hand-over."""

    __slots__ = (
        "coverage",
        "deadline_ms",
        "grant",
        "grants_out",
        "handover",
        "sender",
        "state",
        "stop_code",
        "untold_until_ms",
        "writer_is_remote",
    )

    def __init__(self, sender: PeerId, deadline_ms: float, writer_is_remote: bool) -> None:
        self.sender, self.deadline_ms = sender, deadline_ms
        self.state = ReceiverState.ASKED
        self.grant: Grant | None = None
        self.grants_out = 0  # said, and not come back as unsent
        self.coverage = Coverage(0, 0, 0)
        self.handover: HandOver | None = None
        self.writer_is_remote = writer_is_remote  # as asked for; as granted from `open` on
        self.stop_code = ""
        self.untold_until_ms: float | None = None

    def say_grant(self, now_ms: float) -> Send:
        """For the first time, or again. The lease begins when it may first be heard."""
        assert self.grant is not None, "only who has pages is told of them"
        if self.unheard:
            self.deadline_ms = now_ms + self.grant.lease_ms
        self.grants_out += 1
        return Send(self.sender, self.grant)

    def take_grant_back(self, now_ms: float) -> None:
        """It did not leave. If none has, the pages wait for a while from the first time on: the sender asks again."""
        if not self.grants_out:
            raise ValueError("a Grant came back that was never said")
        self.grants_out -= 1
        if self.unheard:
            self.untold_until_ms = self.untold_until_ms or now_ms + _UNTOLD_MS
            self.deadline_ms = min(self.deadline_ms, self.untold_until_ms)

    def is_filled_by(self, sender: PeerId) -> bool:
        """It has pages, and this sender may send their content."""
        return self.sender == sender and self.state is ReceiverState.FILLING

    @property
    def unheard(self) -> bool:
        """It has pages, and nobody can know which: whatever its state, nobody writes there."""
        return self.grant is not None and self.grants_out == 0

    @property
    def is_broken(self) -> bool:
        """It should not be open, or not in this state."""
        terminal = self.state in (ReceiverState.DELIVERED, ReceiverState.RELEASED)
        ungranted = (self.grant is None) != (self.state is ReceiverState.ASKED)
        stuck = self.coverage.complete and self.handover is not None and self.state is ReceiverState.FILLING
        told_of_nothing = self.grant is None and self.grants_out > 0
        return terminal or ungranted or stuck or told_of_nothing


class Receiver:
    """Decides; never performs. Every method returns what the shell must now do, in order."""

    def __init__(
        self, incarnation: Incarnation, layers: int, *, repeat_ms: float = 500.0, remember_ms: float = 60_000.0
    ) -> None:
        """`repeat_ms`: between two Stops. `remember_ms`: how long late messages about a closed transfer are known."""
        self._incarnation, self._layers = incarnation, layers
        self._repeat_ms, self._remember_ms = repeat_ms, remember_ms
        self._open: dict[TransferId, _Incoming] = {}
        self._closed: dict[TransferId, tuple[PeerId, bool, float]] = {}  # sender, delivered?, forget at (ms)
        self._writers: set[PeerId] = set()  # from `on_peer_joined` to `on_peer_dead`

    @property
    def open_transfers(self) -> list[TransferId]:
        """Neither delivered nor released yet, oldest first."""
        return list(self._open)

    def state_of(self, transfer: TransferId) -> ReceiverState | None:
        """State of an open transfer; None if it is closed or unknown."""
        incoming = self._open.get(transfer)
        return None if incoming is None else incoming.state

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What this sender may fill, if it still may."""
        incoming = self._open.get(transfer)
        return incoming.grant if incoming is not None and incoming.is_filled_by(sender) else None

    def deadline_ms_of(self, transfer: TransferId) -> float | None:
        """When `on_tick` next does something about an open transfer; None if it is closed or unknown."""
        return self._open[transfer].deadline_ms if transfer in self._open else None

    def open(self, sender: PeerId, grant: Grant, writer_is_remote: bool, now_ms: float) -> list[ReceiverAction]:
        """Give pages. `writer_is_remote`: the sender writes them itself (shm), so they may need quarantine.

        If the sender withdrew meanwhile, or would write without a mapping, the answer is Release: the pages are free at once.
        """
        if len(grant.pages) != self._layers or len({len(row) for row in grant.pages}) != 1:
            raise ValueError(
                f"grant of {len(grant.pages)} rows; every one of {self._layers} layers needs equally many pages"
            )
        if writer_is_remote and sender not in self._writers:
            return [Release(grant.transfer)]
        if grant.transfer in self._closed:
            return [self._late(sender, grant.transfer), Release(grant.transfer)]
        incoming = self._open.setdefault(grant.transfer, _Incoming(sender, now_ms, writer_is_remote))
        incoming.state = advance(RECEIVER, incoming.state, ReceiverEvent.GRANT)
        incoming.grant, incoming.writer_is_remote = grant, writer_is_remote
        incoming.coverage = Coverage(self._layers, grant.first_block, grant.first_block + len(grant.pages[0]))
        return [incoming.say_grant(now_ms)]

    def refuse(
        self, transfer: TransferId, code: str, text: str, retryable: bool, now_ms: float
    ) -> list[ReceiverAction]:
        """Give no pages to a transfer that was Asked. The sender tells whoever owns the request."""
        incoming = self._open.get(transfer)
        if incoming is None or incoming.state is not ReceiverState.ASKED:
            return []
        self._close(transfer, incoming, ReceiverEvent.STOP_SELF, now_ms)
        return [Send(incoming.sender, GrantRefused(transfer=transfer, code=code, text=text, retryable=retryable))]

    def on_message(self, sender: PeerId, message: AnyMessage, now_ms: float) -> list[ReceiverAction]:
        """Handle one message from a prefill worker. Raises ProtocolViolation for one that never belongs here."""
        match message:
            case GrantRequest(transport=transport) if transport != "tcp" and sender not in self._writers:
                return []  # sent before its mapping ended, or by a stranger
            case GrantRequest():
                return self._on_request(sender, message, now_ms)
            case Renew(transfers=transfers):
                return [action for transfer in transfers for action in self._on_renew(sender, transfer, now_ms)]
            case KvSent() | HandOver():
                return self._on_content(sender, message, now_ms)
            case Stopped(transfer=transfer):
                return self._on_writer_stopped(sender, transfer, "stopped", now_ms)
            case Abort(transfer=transfer, code=code):
                return self._on_writer_stopped(sender, transfer, code, now_ms)
            case _:
                raise ProtocolViolation(f"decode worker got {type(message).__name__} from {sender}")

    def stop(
        self, transfer: TransferId, code: str, now_ms: float, *, text: str = "", retryable: bool = True
    ) -> list[ReceiverAction]:
        """Give a transfer up: cancelled, past its deadline, or useless. Unknown and closed ones are ignored."""
        incoming = self._open.get(transfer)
        if incoming is None or incoming.state is ReceiverState.STOPPING:
            return []
        reason = text or f"transfer stopped: {code}"
        gave_up = GaveUp(transfer, _phase(incoming), code, reason, retryable)
        if incoming.state is ReceiverState.ASKED:
            return [*self.refuse(transfer, code, reason, retryable, now_ms), gave_up]
        tell = Send(incoming.sender, Stop(transfer=transfer, code=code))
        if not incoming.writer_is_remote:
            self._close(transfer, incoming, ReceiverEvent.STOP_SELF, now_ms)
            return [gave_up, tell, Release(transfer)]
        incoming.state = advance(RECEIVER, incoming.state, ReceiverEvent.STOP_WRITER)
        incoming.deadline_ms, incoming.stop_code = now_ms + self._repeat_ms, code
        return [gave_up, Quarantine(transfer), tell]

    def on_peer_silent(self, sender: PeerId, now_ms: float) -> list[ReceiverAction]:
        """Nothing was heard of a sender for too long. It may still be writing: its transfers are stopped."""
        actions: list[ReceiverAction] = []
        for transfer in self._transfers_of(sender):
            actions += self.stop(transfer, "peer_failed", now_ms, text=f"prefill worker {sender} fell silent")
        return actions

    def on_peer_joined(self, sender: PeerId) -> None:
        """A sender mapped our memory (again, if it had hung up): it may ask to write there from now on."""
        self._writers.add(sender)

    def on_peer_dead(self, sender: PeerId, now_ms: float) -> list[ReceiverAction]:
        """The kernel says that a sender has no mapping of our memory any more: it died or hung up, and cannot write.

        Ends what it writes, or asked to write, for itself; no such request of it is heard until `on_peer_joined`.
        """
        self._writers.discard(sender)
        actions: list[ReceiverAction] = []
        for transfer in self._transfers_of(sender):
            if (incoming := self._open[transfer]).writer_is_remote:
                text = f"prefill worker {sender} died"
                actions += self._writer_gone(transfer, incoming, "peer_failed", text, now_ms)
        return actions

    def on_unsent(self, transfer: TransferId, now_ms: float) -> None:
        """A Grant has not left. If none has, the transfer ends soon, unless its sender asks again before and can be told."""
        if (incoming := self._open.get(transfer)) is not None:
            incoming.take_grant_back(now_ms)

    def on_tick(self, now_ms: float) -> list[ReceiverAction]:
        """Act on every deadline that has passed."""
        while self._closed and next(iter(self._closed.values()))[2] <= now_ms:
            del self._closed[next(iter(self._closed))]
        actions: list[ReceiverAction] = []
        for transfer, incoming in list(self._open.items()):
            if now_ms < incoming.deadline_ms:
                continue
            if incoming.unheard:
                text = f"prefill worker {incoming.sender} could not be told of its pages"
                actions += self._writer_gone(transfer, incoming, "peer_failed", text, now_ms)
                continue
            match incoming.state:
                case ReceiverState.STOPPING:
                    incoming.deadline_ms = now_ms + self._repeat_ms
                    actions.append(Send(incoming.sender, Stop(transfer=transfer, code=incoming.stop_code)))
                case ReceiverState.ASKED:
                    text = "no pages were free in the time the request had"
                    actions += self.stop(transfer, "deadline_exceeded", now_ms, text=text, retryable=False)
                case _:
                    text = f"prefill worker {incoming.sender} did not renew its lease"
                    actions += self.stop(transfer, "peer_failed", now_ms, text=text)
        return actions

    def check(self) -> None:
        """Raise RuntimeError if an entry should have left, or is open and closed at once."""
        for transfer, incoming in self._open.items():
            if incoming.is_broken or transfer in self._closed:
                raise RuntimeError(
                    f"transfer {transfer} is {incoming.state.value} and should be closed, or in another state"
                )

    def _on_request(self, sender: PeerId, request: GrantRequest, now_ms: float) -> list[ReceiverAction]:
        incoming = self._open.get(request.transfer)
        if incoming is None:
            if request.transfer in self._closed:
                return [self._late(sender, request.transfer)]
            writer_is_remote = request.transport != "tcp"
            self._open[request.transfer] = _Incoming(sender, now_ms + request.timeout_ms, writer_is_remote)
            return [Asked(sender, request)]
        if incoming.is_filled_by(sender):
            return [incoming.say_grant(now_ms)]  # the first one was lost
        waits = incoming.state is ReceiverState.ASKED and incoming.sender == sender
        return [Send(sender, GrantPending(transfer=request.transfer))] if waits else []

    def _on_renew(self, sender: PeerId, transfer: TransferId, now_ms: float) -> list[ReceiverAction]:
        incoming = self._open.get(transfer)
        if incoming is None:
            return [self._late(sender, transfer)]
        if incoming.is_filled_by(sender) and incoming.grant is not None:
            incoming.deadline_ms = now_ms + incoming.grant.lease_ms
        return []

    def _on_content(self, sender: PeerId, message: KvSent | HandOver, now_ms: float) -> list[ReceiverAction]:
        incoming = self._open.get(message.transfer)
        if incoming is None:
            return [self._late(sender, message.transfer)]
        if not incoming.is_filled_by(sender):
            return []  # not theirs; or being stopped, and Stop is repeated anyway
        if message.epoch != self._incarnation:
            return [Send(sender, Stop(transfer=message.transfer, code="wrong_epoch"))]
        actions: list[ReceiverAction] = []
        if isinstance(message, HandOver):
            incoming.handover = message
        elif all(incoming.coverage.fits(span) for span in message.spans):
            actions += self._fill(incoming, message)
        else:
            text = f"prefill worker {sender} sent blocks that were not granted"
            return self.stop(message.transfer, "protocol_violation", now_ms, text=text)
        if incoming.handover is not None and incoming.coverage.complete:
            self._close(message.transfer, incoming, ReceiverEvent.COMPLETE, now_ms)
            commit = Send(sender, Commit(transfer=message.transfer))
            actions += [Deliver(message.transfer, incoming.handover), commit]
        return actions

    def _fill(self, incoming: _Incoming, message: KvSent) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        grant = incoming.grant
        assert grant is not None, "FILLING without a grant"
        incoming.state = advance(RECEIVER, incoming.state, ReceiverEvent.KV)
        for payload, span in enumerate(message.spans):
            if not incoming.writer_is_remote:  # a span that comes again was computed anew: the last one counts
                actions.append(Fill(message.transfer, span, granted_pages(grant, span), payload))
            incoming.coverage.add(span)
        return actions

    def _on_writer_stopped(
        self, sender: PeerId, transfer: TransferId, code: str, now_ms: float
    ) -> list[ReceiverAction]:
        incoming = self._open.get(transfer)
        if incoming is None or incoming.sender != sender:
            return []
        return self._writer_gone(transfer, incoming, code, f"prefill worker {sender} gave up: {code}", now_ms)

    def _writer_gone(
        self, transfer: TransferId, incoming: _Incoming, code: str, text: str, now_ms: float
    ) -> list[ReceiverAction]:
        state = incoming.state
        gave_up = GaveUp(transfer, _phase(incoming), code, text, retryable=True)
        self._close(transfer, incoming, ReceiverEvent.WRITER_STOPPED, now_ms)
        match state:
            case ReceiverState.ASKED:
                return [gave_up]
            case ReceiverState.STOPPING:
                return [Release(transfer)]
            case _:
                return [gave_up, Release(transfer)]

    def _close(self, transfer: TransferId, incoming: _Incoming, event: ReceiverEvent, now_ms: float) -> None:
        incoming.state = advance(RECEIVER, incoming.state, event)
        delivered = incoming.state is ReceiverState.DELIVERED
        del self._open[transfer]
        self._closed[transfer] = (incoming.sender, delivered, now_ms + self._remember_ms)

    def _late(self, sender: PeerId, transfer: TransferId) -> Send:
        """What ends the wait of a sender that still believes in a closed transfer."""
        owner, delivered, _ = self._closed.get(transfer, (sender, False, 0.0))
        if delivered and owner == sender:
            return Send(sender, Commit(transfer=transfer))
        return Send(sender, Stop(transfer=transfer, code="closed"))

    def _transfers_of(self, sender: PeerId) -> list[TransferId]:
        return [transfer for transfer, incoming in self._open.items() if incoming.sender == sender]


def _phase(incoming: _Incoming) -> str:
    return "grant" if incoming.state is ReceiverState.ASKED or incoming.unheard else "transfer"
