"""Hand-overs that come to a decode worker: waiting for pages, being filled, delivered. Pure.

Owns one IncomingTransfer per hand-over; who waits for pages, in which order, is page_queue's, the protocol itself
kvstore.handover.receiver's. One without pages leaves by being refused or given up, one with pages by Deliver (they become
the request's) or Release (they are free again).
"""

import msgspec

from common.errors import KvCorrupt
from common.ids import PeerId, RequestId, TransferId
from common.messages.actions import Send
from common.messages.handover import Abort, Grant, GrantRequest, HandOver, KvSent, Renew, Stopped
from kvstore.handover.actions import Asked, Deliver, Fill, GaveUp, Quarantine, ReceiverAction, Release
from kvstore.handover.receiver import Receiver
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageState
from services.worker.core.actions import Action
from services.worker.core.generation import Generation
from services.worker.core.incoming_transfer import IncomingTransfer
from services.worker.core.page_queue import GrantTerms, PageQueue
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import request_owner
from services.worker.core.watchdog import Wait


class Incoming:
    """Grants pages to prefill workers, first come first served, and takes their finished prompts over."""

    def __init__(
        self, receiver: Receiver, pool: BlockPool, scheduler: Scheduler, generation: Generation, terms: GrantTerms
    ) -> None:
        self._receiver, self._pool, self._generation = receiver, pool, generation
        self._queue = PageQueue(pool, scheduler, terms)
        self._transfers: dict[TransferId, IncomingTransfer] = {}
        scheduler.room.count_promised(lambda: self._n_promised)

    def on_message(
        self, sender: PeerId, message: GrantRequest | KvSent | HandOver | Abort | Stopped | Renew, now_ms: float
    ) -> list[Action]:
        """A protocol message of a prefill worker."""
        if isinstance(message, HandOver) and (incoming := self._transfers.get(message.transfer)) is not None:
            incoming.note_handed(message, now_ms)
        return self._carry_out(self._receiver.on_message(sender, message, now_ms), now_ms)

    def on_corrupt(self, transfer: TransferId, text: str, now_ms: float) -> list[Action]:
        """What came of a transfer is not what was sent: it is stopped, and the request may be tried again."""
        return self._carry_out(self._receiver.stop(transfer, KvCorrupt.code, now_ms, text=text), now_ms)

    def give_up(self, request: RequestId, code: str, text: str, now_ms: float) -> list[Action]:
        """End what comes for a request; its gateway may try it elsewhere."""
        mine = [transfer for transfer, incoming in self._transfers.items() if incoming.arrival.request == request]
        return [a for t in mine for a in self._carry_out(self._receiver.stop(t, code, now_ms, text=text), now_ms)]

    def on_unsent(self, grant: Grant, now_ms: float) -> None:
        """A Grant could not be sent: if nobody is told of its pages within seconds, they are free again."""
        self._receiver.on_unsent(grant.transfer, now_ms)

    def on_sender_joined(self, sender: PeerId) -> None:
        """The sender maps our pages (again)."""
        self._receiver.on_peer_joined(sender)

    def on_sender_dead(self, sender: PeerId, now_ms: float) -> list[Action]:
        """The kernel reported the sender's death: it writes no more."""
        return self._carry_out(self._receiver.on_peer_dead(sender, now_ms), now_ms)

    def on_sender_silent(self, sender: PeerId, now_ms: float) -> list[Action]:
        """The sender may be dead, but may also write again: its transfers are stopped, their pages wait."""
        return self._carry_out(self._receiver.on_peer_silent(sender, now_ms), now_ms)

    def cancel(self, request: RequestId, code: str, now_ms: float) -> list[Action]:
        """The gateway ended the request, or a newer transfer replaces this one. The gateway is not told again."""
        actions: list[Action] = []
        for transfer, incoming in list(self._transfers.items()):
            if incoming.arrival.request == request:
                incoming.told = True
                actions += self._carry_out(self._receiver.stop(transfer, code, now_ms, retryable=False), now_ms)
        return actions

    def forget_gateway(self, gateway: PeerId, now_ms: float) -> list[Action]:
        """The gateway fell silent. It is told all the same: if it only paused, it must not wait for ever."""
        text = f"gateway {gateway} was silent for too long"
        mine = {transfer: one for transfer, one in self._transfers.items() if one.arrival.gateway == gateway}
        actions = list[Action]()
        for transfer, one in mine.items():
            actions += one.tell(GaveUp(transfer, "transfer", "peer_failed", text, True), now_ms)
        for request in dict.fromkeys(one.arrival.request for one in mine.values()):
            actions += self.cancel(request, "gateway_gone", now_ms)
        return actions

    def on_tick(self, now_ms: float) -> list[Action]:
        """Deadlines of open transfers, leases, repeats."""
        actions: list[Action] = []
        for transfer, incoming in list(self._transfers.items()):
            if now_ms >= incoming.arrival.deadline_ms:
                text = "the request's time ran out while its prompt was being handed over"
                stopped = self._receiver.stop(transfer, "deadline_exceeded", now_ms, text=text, retryable=False)
                actions += self._carry_out(stopped, now_ms)
        return actions + self._carry_out(self._receiver.on_tick(now_ms), now_ms) + self.pump(now_ms)

    def _on_asked(self, sender: PeerId, request: GrantRequest, now_ms: float) -> list[Action]:
        if (refusal := self._queue.refusal(request)) is not None:
            return self._carry_out(self._receiver.refuse(request.transfer, *refusal, False, now_ms), now_ms)
        actions = self.cancel(request.request, "superseded", now_ms)
        self._transfers[request.transfer] = self._queue.add(sender, request, now_ms)
        return actions + self.pump(now_ms)

    def end_too_large(self, now_ms: float) -> list[Action]:
        """Refuses queued requests that need more pages than there are."""
        actions: list[Action] = []
        for incoming, text in self._queue.unfit():
            transfer = incoming.request.transfer
            stopped = self._receiver.stop(transfer, "out_of_pages", now_ms, text=text, retryable=False)
            actions += self._carry_out(stopped, now_ms)
        return actions

    def pump(self, now_ms: float) -> list[Action]:
        """Grant while pages last."""
        actions: list[Action] = []
        while (served := self._queue.serve(now_ms)) is not None:
            incoming, grant = served
            opened = self._receiver.open(incoming.sender, grant, incoming.request.transport != "tcp", now_ms)
            actions += self._carry_out(opened, now_ms)
        return actions

    def _carry_out(self, steps: list[ReceiverAction], now_ms: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            match step:
                case Send() | Fill():
                    actions.append(step)
                case Asked(sender=sender, request=request):
                    actions += self._on_asked(sender, request, now_ms)
                case Deliver(transfer=transfer, handover=handover):
                    actions += self._deliver(transfer, handover, now_ms)
                case Quarantine(transfer=transfer):
                    self._pool.move(self._transfers[transfer].owner, PageState.QUARANTINED)
                    self._transfers[transfer].note_quarantined(now_ms)
                case Release(transfer=transfer):
                    self._pool.release(self._transfers[transfer].owner)
                    del self._transfers[transfer]
                    actions += self.pump(now_ms)
                case GaveUp():
                    actions += self._on_gave_up(step, now_ms)
        return actions

    def _deliver(self, transfer: TransferId, handover: HandOver, now_ms: float) -> list[Action]:
        incoming = self._transfers.pop(transfer)
        assert incoming.table is not None, f"{transfer} was delivered without a grant"
        owner = request_owner(incoming.arrival.request)
        self._pool.rename(incoming.owner, owner)
        self._pool.move(owner, PageState.ACTIVE)
        if (timings := incoming.timings_at(now_ms)) is not None:  # its last pages may have come after it
            handover = msgspec.structs.replace(handover, timings=timings)
        return self._generation.take_over(incoming.arrival, incoming.table, incoming.cached_blocks, handover, now_ms)

    def _on_gave_up(self, gave_up: GaveUp, now_ms: float) -> list[Action]:
        incoming = self._transfers.get(gave_up.transfer)
        if incoming is None:
            return []
        if incoming.table is None:  # it held nothing, so no Release will come
            self._queue.remove(incoming)
            del self._transfers[gave_up.transfer]
        return [*incoming.tell(gave_up, now_ms)]

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return transfer in self._transfers and self._transfers[transfer].request.transport == "tcp"

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What this sender may fill for a transfer, if it still may."""
        return self._receiver.grant_of(transfer, sender)

    def knows(self, transfer: TransferId) -> bool:
        """Whether this transfer was asked for and has not ended."""
        return transfer in self._transfers

    def expects(self, request: RequestId) -> bool:
        """Whether a transfer of this request goes on."""
        return any(one.arrival.request == request and not one.told for one in self._transfers.values())

    @property
    def _n_promised(self) -> int:
        return sum(1 for one in self._transfers.values() if one.table is not None and not one.quarantined)

    def abandon(self) -> list[Action]:
        """This worker ends: tell every gateway that still waits."""
        text = "the decode worker was told to stop, and its time to drain is over"
        ends = [
            (one, GaveUp(transfer, "transfer", "peer_failed", text, True)) for transfer, one in self._transfers.items()
        ]
        return [action for one, end in ends for action in one.tell(end)]

    def waits(self, now_ms: float, held_ms: float) -> list[Wait]:
        """What every transfer that is here waits for. `held_ms`: for how long it is right to wait for a writer's word."""
        waits = list[Wait]()
        for transfer, one in self._transfers.items():
            ends_ms = one.since_ms + held_ms if one.quarantined else self._receiver.deadline_ms_of(transfer)
            waits.append(one.wait(self._pool, ends_ms, now_ms))
        return waits

    def oldest_quarantined_ms(self, now_ms: float) -> float:
        """How long the pages of a transfer that has ended wait for their writer; 0 if none do."""
        return max((now_ms - one.since_ms for one in self._transfers.values() if one.quarantined), default=0.0)

    @property
    def n_open(self) -> int:
        """Transfers granted or waiting for pages."""
        return len(self._transfers)

    def check(self) -> None:
        """The receiver's own law, and: every granted transfer owns its pages. Raises RuntimeError."""
        self._receiver.check()
        for incoming in self._transfers.values():
            incoming.check(self._pool)
