"""Hand-overs that come to a decode worker: waiting for pages, being filled, delivered. Pure.

Owns the queue of grant requests, and one `_Incoming` per granted transfer with its page table; the protocol itself is
kvstore.handover.receiver's. A queued request leaves by being granted, refused (deadline, cancel) or its sender's death.
A granted one leaves by Deliver (the pages become the request's) or Release (the pages are free again).
"""

from collections import deque
from dataclasses import dataclass

from kvstore.handover.actions import Action as HandoverAction
from kvstore.handover.actions import Deliver, GaveUp, Quarantine, Release, Send
from kvstore.handover.receiver import Receiver

from common.ids import Incarnation, Owner, PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages.handover import Abort, Grant, GrantRefused, GrantRequest, HandOver, KvSent, Renew, Stopped
from common.messages.requests import Failed
from kvstore.index.ledger import Ledger, PageState
from kvstore.index.page_table import PageTable
from services.worker.core.actions import Action, WritePayload
from services.worker.core.generation import Arrival, Generation
from services.worker.core.scheduler import Scheduler


@dataclass(slots=True)
class _Incoming:
    arrival: Arrival
    sender: PeerId
    request: GrantRequest
    table: PageTable
    told: bool = False
    """The gateway knows already that this will not end well (or cancelled it itself)."""


class Incoming:
    """Grants pages to prefill workers and takes their finished prompts over."""

    def __init__(
        self,
        receiver: Receiver,
        ledger: Ledger,
        layout: KvLayout,
        scheduler: Scheduler,
        generation: Generation,
        *,
        epoch: Incarnation,
        lease_ms: int,
    ) -> None:
        self._receiver, self._ledger, self._layout = receiver, ledger, layout
        self._scheduler, self._generation = scheduler, generation
        self._epoch, self._lease_ms = epoch, lease_ms
        self._queue: deque[tuple[PeerId, GrantRequest, Arrival]] = deque()
        self._open: dict[TransferId, _Incoming] = {}

    # -- asking and granting

    def ask(self, sender: PeerId, message: GrantRequest, now_ms: float) -> list[Action]:
        """A prefill worker wants pages. Answers now, or keeps the question until pages are free."""
        if message.transfer in self._open or any(message.transfer == queued[1].transfer for queued in self._queue):
            return []  # a repeat
        if not self._scheduler.fits_pool(len(message.prompt), message.sampling.max_tokens):
            pages = self._scheduler.pool_pages_for(len(message.prompt), message.sampling.max_tokens)
            text = f"the request needs up to {pages} pages; this worker has {self._ledger.total_pages} in all"
            return [_refuse(sender, message, "out_of_pages", text, retryable=False)]
        deadline_ms = now_ms + message.timeout_ms
        arrival = Arrival(message.request, message.gateway, message.prompt, message.sampling, deadline_ms)
        actions = self.cancel(message.request, "superseded", now_ms)
        self._queue.append((sender, message, arrival))
        return actions + self.pump(now_ms)

    def pump(self, now_ms: float) -> list[Action]:
        """Grant to the head of the queue while pages last. Preempted sequences come before new ones."""
        actions: list[Action] = []
        while self._queue and self._scheduler.n_waiting == 0:
            sender, message, arrival = self._queue[0]
            if not self._scheduler.has_room(len(message.prompt) + 1):
                break
            self._queue.popleft()
            actions += self._grant(sender, message, arrival, now_ms)
        return actions

    def _grant(self, sender: PeerId, message: GrantRequest, arrival: Arrival, now_ms: float) -> list[Action]:
        n_pages = self._layout.pages_for(len(message.prompt))
        pages = self._ledger.alloc(Owner(message.transfer), n_pages, PageState.GRANTED)
        table = PageTable(self._layout.layers)
        table.append(pages)
        self._open[message.transfer] = _Incoming(arrival, sender, message, table)
        grant = Grant(
            transfer=message.transfer,
            epoch=self._epoch,
            first_block=0,
            pages=tuple(tuple(row) for row in table.ids.tolist()),
            lease_ms=self._lease_ms,
        )
        writer_is_remote = message.transport != "tcp"
        return self._carry_out(
            self._receiver.open(sender, grant, writer_is_remote=writer_is_remote, now_ms=now_ms), now_ms
        )

    # -- protocol messages

    def on_message(
        self, sender: PeerId, message: KvSent | HandOver | Abort | Stopped | Renew, now_ms: float
    ) -> list[Action]:
        """KvSent, HandOver, Abort, Stopped, Renew of a prefill worker."""
        writes: list[Action] = []
        if isinstance(message, KvSent):
            writes = self._payload_writes(sender, message)
        return writes + self._carry_out(self._receiver.on_message(sender, message, now_ms), now_ms)

    def _payload_writes(self, sender: PeerId, message: KvSent) -> list[Action]:
        incoming = self._open.get(message.transfer)
        if incoming is None or incoming.sender != sender or incoming.request.transport != "tcp":
            return []
        if message.epoch != self._epoch:
            return []
        rows = incoming.table.ids
        return [
            WritePayload(tuple(rows[span.layer, span.first_block : span.first_block + span.n_blocks].tolist()), index)
            for index, span in enumerate(message.spans)
        ]

    def _carry_out(self, steps: list[HandoverAction], now_ms: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            match step:
                case Send():
                    actions.append(step)
                case Deliver(transfer=transfer, handover=handover):
                    incoming = self._open.pop(transfer)
                    self._ledger.rename(Owner(transfer), Owner(incoming.arrival.request))
                    self._ledger.move(Owner(incoming.arrival.request), PageState.ACTIVE)
                    actions += self._generation.take_over(incoming.arrival, incoming.table, handover)
                case Quarantine(transfer=transfer):
                    self._ledger.move(Owner(transfer), PageState.QUARANTINED)
                case Release(transfer=transfer):
                    self._ledger.free(Owner(transfer))
                    del self._open[transfer]
                    actions += self.pump(now_ms)
                case GaveUp():
                    actions += self._tell(step)
        return actions

    def _tell(self, gave_up: GaveUp) -> list[Action]:
        incoming = self._open.get(gave_up.transfer)
        if incoming is None or incoming.told:
            return []
        incoming.told = True
        failed = Failed(
            request=incoming.arrival.request,
            code=gave_up.code,
            phase=gave_up.phase,
            text=gave_up.text,
            retryable=gave_up.retryable,
            transfer=gave_up.transfer,
        )
        return [Send(incoming.arrival.gateway, failed)]

    # -- endings

    def cancel(self, request: RequestId, code: str, now_ms: float) -> list[Action]:
        """The gateway cancelled, or a newer transfer replaces this one; nobody is told but the sender."""
        actions: list[Action] = []
        for queued in [q for q in self._queue if q[1].request == request]:
            self._queue.remove(queued)
            actions.append(_refuse(queued[0], queued[1], code, "the request was cancelled", retryable=False))
        for transfer, incoming in list(self._open.items()):
            if incoming.arrival.request == request and not incoming.told:
                incoming.told = True
                actions += self._carry_out(self._receiver.stop(transfer, code, now_ms), now_ms)
        return actions

    def forget_gateway(self, gateway: PeerId, now_ms: float) -> list[Action]:
        """Nobody waits for these requests any more."""
        requests = [q[1].request for q in self._queue if q[2].gateway == gateway]
        requests += [i.arrival.request for i in self._open.values() if i.arrival.gateway == gateway]
        return [action for request in requests for action in self.cancel(request, "gateway_gone", now_ms)]

    def on_sender_dead(self, sender: PeerId, now_ms: float) -> list[Action]:
        """The kernel reported the sender's death: it writes no more."""
        self._queue = deque(q for q in self._queue if q[0] != sender)
        return self._carry_out(self._receiver.on_peer_dead(sender, now_ms), now_ms)

    def on_sender_silent(self, sender: PeerId, now_ms: float) -> list[Action]:
        """The sender may be dead, but may also write again: its transfers are stopped, their pages wait."""
        self._queue = deque(q for q in self._queue if q[0] != sender)
        actions: list[Action] = []
        for transfer, incoming in list(self._open.items()):
            if incoming.sender == sender:
                text = f"prefill worker {sender} stopped answering while it handed the prompt over"
                actions += self._tell(GaveUp(transfer, "transfer", "peer_failed", text, True))
                actions += self._carry_out(self._receiver.stop(transfer, "sender_silent", now_ms), now_ms)
        return actions

    def on_tick(self, now_ms: float) -> list[Action]:
        """Deadlines of queued and open transfers, leases, repeats."""
        actions: list[Action] = []
        for queued in [q for q in self._queue if now_ms >= q[2].deadline_ms]:
            self._queue.remove(queued)
            text = "no pages became free within the request's time"
            actions.append(_refuse(queued[0], queued[1], "deadline_exceeded", text, retryable=False))
        for transfer, incoming in list(self._open.items()):
            if now_ms >= incoming.arrival.deadline_ms and not incoming.told:
                text = "the request's time ran out while its prompt was being handed over"
                actions += self._tell(GaveUp(transfer, "transfer", "deadline_exceeded", text, False))
                actions += self._carry_out(self._receiver.stop(transfer, "deadline_exceeded", now_ms), now_ms)
        return actions + self._carry_out(self._receiver.on_tick(now_ms), now_ms) + self.pump(now_ms)

    @property
    def n_open(self) -> int:
        """Transfers granted or waiting for pages."""
        return len(self._open) + len(self._queue)

    def check(self) -> None:
        """The receiver's own law, and: every open transfer owns its pages."""
        self._receiver.check()
        for transfer, incoming in self._open.items():
            if len(self._ledger.pages_of(Owner(transfer))) != incoming.table.ids.size:
                raise AssertionError(f"{transfer} does not own its {incoming.table.ids.size} pages")


def _refuse(sender: PeerId, message: GrantRequest, code: str, text: str, *, retryable: bool) -> Send:
    refusal = GrantRefused(transfer=message.transfer, code=code, text=text, retryable=retryable)
    return Send(sender, refusal)
