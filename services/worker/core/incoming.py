"""Hand-overs that come to a decode worker: waiting for pages, being filled, delivered. Pure.

Owns the queue of requests for pages and, per granted transfer, its page table; the protocol itself is
kvstore.handover.receiver's. A queued request leaves by being granted, refused, or its sender's death. A granted one
leaves by Deliver (the pages become the request's) or Release (the pages are free again).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from common.block_hash import BlockHash, hash_blocks
from common.errors import KvCorrupt
from common.ids import Incarnation, Owner, PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages.actions import Send
from common.messages.handover import Abort, Grant, GrantRequest, HandOver, KvSent, Renew, Stopped
from common.messages.requests import Failed, Timings
from kvstore.handover.actions import Asked, Deliver, Fill, GaveUp, Quarantine, ReceiverAction, Release
from kvstore.handover.receiver import Receiver
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageState
from kvstore.index.page_table import PageTable
from services.worker.core.actions import Action
from services.worker.core.generation import Arrival, Generation
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import request_owner
from services.worker.core.watchdog import Wait
from services.worker.core.wire import refusal_of, too_large


@dataclass(slots=True)
class _Incoming:
    """One transfer from Asked to its end."""

    arrival: Arrival
    sender: PeerId
    request: GrantRequest
    table: PageTable | None = None
    """None while it waits for pages."""
    handed_ms: float | None = None
    """When its HandOver was heard."""
    timings: Timings = field(default_factory=Timings)
    """As that said; without it nobody here knows where the time went."""
    cached_blocks: int = 0
    """Leading blocks of the table that were cached here: the sender need not send them."""
    told: bool = False
    """The gateway knows that this ends without an answer, or ended it itself."""
    quarantined: bool = False
    """It will never be delivered; its sender may still write to its pages."""
    since_ms: float = 0.0
    """When it came, was granted pages, or was quarantined: the last of these."""

    def note_handed(self, handover: HandOver, now_ms: float) -> None:
        """Its HandOver is here, maybe again, and maybe before its last pages."""
        if self.handed_ms is None:
            self.handed_ms, self.timings = now_ms, handover.timings

    def timings_at(self, now_ms: float) -> Timings | None:
        """Where its time has gone; None before its HandOver."""
        if self.handed_ms is None:
            return None
        transfer_ms = self.timings.transfer_ms + now_ms - self.handed_ms
        return msgspec.structs.replace(self.timings, transfer_ms=transfer_ms)


@dataclass(frozen=True, slots=True)
class GrantTerms:
    """What every grant of this worker says."""

    layout: KvLayout
    keeps_blocks: bool
    """Whether prompts may share blocks that are cached here."""
    root: Callable[[str], BlockHash]
    """Cache salt -> what the names of blocks start from."""
    epoch: Incarnation
    lease_ms: int
    vocab_tokens: int
    context_tokens: int
    """Prompt plus output may not exceed this."""


class Incoming:
    """Grants pages to prefill workers, first come first served, and takes their finished prompts over."""

    def __init__(
        self,
        receiver: Receiver,
        pool: BlockPool,
        scheduler: Scheduler,
        generation: Generation,
        terms: GrantTerms,
    ) -> None:
        self._receiver, self._pool = receiver, pool
        self._scheduler, self._generation, self._terms = scheduler, generation, terms
        self._queue: deque[TransferId] = deque()
        self._transfers: dict[TransferId, _Incoming] = {}
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
        mine = [transfer for transfer, i in self._transfers.items() if i.arrival.gateway == gateway]
        told = [a for t in mine for a in self._tell(GaveUp(t, "transfer", "peer_failed", text, True), now_ms)]
        requests = {i.arrival.request: None for i in self._transfers.values() if i.arrival.gateway == gateway}
        return told + [action for request in requests for action in self.cancel(request, "gateway_gone", now_ms)]

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
        if refusal := refusal_of(request, self._terms.vocab_tokens, self._terms.context_tokens):
            refused = self._receiver.refuse(request.transfer, "invalid_request", refusal, False, now_ms)
            return self._carry_out(refused, now_ms)
        if text := self._too_large(request):
            refused = self._receiver.refuse(request.transfer, "out_of_pages", text, False, now_ms)
            return self._carry_out(refused, now_ms)
        actions = self.cancel(request.request, "superseded", now_ms)
        deadline_ms = now_ms + request.timeout_ms
        root = self._terms.root(request.cache_salt)
        names, tokens = list[BlockHash](), request.prompt + request.emitted
        if self._terms.keeps_blocks:
            names = hash_blocks(tokens, root, self._terms.layout.block_tokens)
        arrival = Arrival(
            request=request.request,
            gateway=request.gateway,
            tokens=tokens,
            emitted_tokens=len(request.emitted),
            sampling=request.sampling,
            deadline_ms=deadline_ms,
            root=root,
            names=tuple(names),
            origin=sender,
        )
        self._transfers[request.transfer] = _Incoming(arrival, sender, request, since_ms=now_ms)
        self._queue.append(request.transfer)
        return actions + self.pump(now_ms)

    def _too_large(self, request: GrantRequest) -> str:
        pages = self._terms.layout.pages_at_most(len(request.prompt), request.sampling.max_tokens)
        return too_large(pages, self._pool.usable_pages)

    def end_too_large(self, now_ms: float) -> list[Action]:
        """Refuses queued requests that need more pages than there are."""
        actions: list[Action] = []
        for transfer in list(self._queue):
            if text := self._too_large(self._transfers[transfer].request):
                stopped = self._receiver.stop(transfer, "out_of_pages", now_ms, text=text, retryable=False)
                actions += self._carry_out(stopped, now_ms)
        return actions

    def pump(self, now_ms: float) -> list[Action]:
        """Grant to the head of the queue while pages last. Preempted sequences come before new ones."""
        actions: list[Action] = []
        self._scheduler.giving_way.no_wish()
        while self._queue:
            incoming = self._transfers[self._queue[0]]
            arrival = incoming.arrival
            grows = arrival.sampling.max_tokens > arrival.emitted_tokens + 1  # the last drawn token needs no page
            tokens = len(arrival.tokens) + grows
            pinned = self._pool.pinned_run(incoming.arrival.names)
            if not self._scheduler.grants(tokens, pinned_blocks=pinned):
                break
            self._queue.popleft()
            actions += self._grant(incoming, now_ms)
        return actions

    def _grant(self, incoming: _Incoming, now_ms: float) -> list[Action]:
        request, owner, names = incoming.request, _owner(incoming.request.transfer), incoming.arrival.names
        hits = incoming.cached_blocks = self._pool.match(names)
        incoming.table, incoming.since_ms = PageTable(self._terms.layout.layers), now_ms
        if hits:
            incoming.table.append(self._pool.take(owner, names[:hits]))
        missing = self._terms.layout.blocks_for(len(incoming.arrival.tokens)) - hits
        granted = self._pool.alloc(owner, missing, PageState.GRANTED)
        incoming.table.append(granted)
        grant = Grant(
            transfer=request.transfer,
            epoch=self._terms.epoch,
            first_block=hits,
            pages=tuple(tuple(row) for row in granted.T.tolist()),
            lease_ms=self._terms.lease_ms,
        )
        opened = self._receiver.open(incoming.sender, grant, request.transport != "tcp", now_ms)
        return self._carry_out(opened, now_ms)

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
                    self._pool.move(_owner(transfer), PageState.QUARANTINED)
                    self._transfers[transfer].quarantined, self._transfers[transfer].since_ms = True, now_ms
                case Release(transfer=transfer):
                    self._pool.release(_owner(transfer))
                    self._transfers.pop(transfer)
                    actions += self.pump(now_ms)
                case GaveUp():
                    actions += self._on_gave_up(step, now_ms)
        return actions

    def _deliver(self, transfer: TransferId, handover: HandOver, now_ms: float) -> list[Action]:
        incoming = self._transfers.pop(transfer)
        assert incoming.table is not None, f"{transfer} was delivered without a grant"
        owner = request_owner(incoming.arrival.request)
        self._pool.rename(_owner(transfer), owner)
        self._pool.move(owner, PageState.ACTIVE)
        if (timings := incoming.timings_at(now_ms)) is not None:  # its last pages may have come after it
            handover = msgspec.structs.replace(handover, timings=timings)
        return self._generation.take_over(incoming.arrival, incoming.table, incoming.cached_blocks, handover, now_ms)

    def _on_gave_up(self, gave_up: GaveUp, now_ms: float) -> list[Action]:
        incoming = self._transfers.get(gave_up.transfer)
        if incoming is None:
            return []
        if incoming.table is None:  # it held nothing, so no Release will come
            self._queue.remove(gave_up.transfer)
        told = self._tell(gave_up, now_ms)
        if incoming.table is None:
            del self._transfers[gave_up.transfer]
        return told

    def _tell(self, gave_up: GaveUp, now_ms: float | None = None) -> list[Action]:
        incoming = self._transfers[gave_up.transfer]
        if incoming.told:
            return []
        incoming.told = True
        failed = Failed(
            request=incoming.arrival.request,
            code=gave_up.code,
            phase=gave_up.phase,
            text=gave_up.text,
            retryable=gave_up.retryable,
            transfer=gave_up.transfer,
            timings=None if now_ms is None else incoming.timings_at(now_ms),
        )
        return [Send(incoming.arrival.gateway, failed)]

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return transfer in self._transfers and self._transfers[transfer].request.transport == "tcp"

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What this sender may fill for a transfer, if it still may."""
        return self._receiver.grant_of(transfer, sender)

    def knows(self, transfer: TransferId) -> bool:
        """Whether this transfer was asked for and has not ended."""
        return transfer in self._transfers

    @property
    def _n_promised(self) -> int:
        return sum(1 for one in self._transfers.values() if one.table is not None and not one.quarantined)

    def abandon(self) -> list[Action]:
        """This worker ends: tell every gateway that still waits."""
        text = "the decode worker was told to stop, and its time to drain is over"
        steps = [GaveUp(transfer, "transfer", "peer_failed", text, True) for transfer in self._transfers]
        return [action for step in steps for action in self._tell(step)]

    def waits(self, now_ms: float) -> list[Wait]:
        """What every transfer that is here waits for."""
        ends_ms = self._receiver.deadline_ms_of
        return [_wait(one, self._pool, ends_ms(transfer), now_ms) for transfer, one in self._transfers.items()]

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
        for transfer, incoming in self._transfers.items():
            table, layers = incoming.table, self._terms.layout.layers
            wanted = 0 if table is None else table.ids.size - incoming.cached_blocks * layers
            held = len(self._pool.pages_of(_owner(transfer)))
            if held != wanted:
                raise RuntimeError(f"transfer {transfer} holds {held} pages, not those of its table")


def _wait(incoming: _Incoming, pool: BlockPool, until_ms: float | None, now_ms: float) -> Wait:
    granted, request = incoming.table is not None, incoming.request
    held_by = f"{incoming.sender} to say that it writes no more" if incoming.quarantined else f"KV of {incoming.sender}"
    return Wait(
        request=request.request,
        phase="transfer" if granted else "grant",
        age_ms=now_ms - incoming.since_ms,
        pages=int(pool.ledger.page_ids(_owner(request.transfer)).size),
        waits_for=held_by if granted else "pages",
        until_ms=until_ms if granted and not incoming.quarantined else None,
        queued=not granted,
        over=incoming.told,
    )


def _owner(transfer: TransferId) -> Owner:
    """Under which name the pages of a transfer are kept until it is delivered."""
    return Owner(f"transfer/{transfer}")
