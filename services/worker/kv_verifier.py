"""What comes and leaves by message under `--verify-kv`: held back until its checksums are made, and compared. Shell side.

KvSent, and Found with its bytes, are held until the bytes are known to be right; then, and only then, the core hears of them.
Found that names pages is held until it carries checksums. The thread only reads; the loop compares.

Payloads of a KvSent are written into the granted pages as they come, and the pages are what is read: so one comparison covers
the frame and the copy out of it, and a peer that sends payloads is treated as one that writes. Where the peer writes the
pages itself, frames that come along are nobody's.

A prompt that was displaced in the middle is computed anew, and its spans are sent again: pages that a peer writes itself may
be written while they are read here, a payload may be older than the checksums that were made behind it; and an older KvSent
may be late. So a page that does not match is not condemned at once. The newest KvSent that
covers it counts; and what still does not match when the HandOver has come, which is sent after all copies have ended, is
read once more, when nobody writes any more. Only then the transfer ends as corrupt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import msgspec

from common.clock import Clock
from common.errors import ProtocolViolation
from common.ids import PeerId, TransferId
from common.log import Log
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.blocks import Found
from common.messages.handover import Grant, HandOver, KvSent
from common.net.sockets import Payload
from kvstore.handover.coverage import Coverage
from kvstore.handover.spans import granted_pages, n_pages
from kvstore.transport.block_jobs import BlockJobDone, FetchJob
from kvstore.transport.checksums import Checksums, in_rows, wrong_places
from services.worker.checksum_thread import ChecksumsMade, Pages, Payloads
from services.worker.core.host_buffer import HOST_BUFFER

Fill = Callable[[Sequence[int], Payload], None]
Post = Callable[[int, Pages | Payloads], None]


class Grants(Protocol):
    """Who knows what was granted: a worker's core."""

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What a sender may fill; None: nothing, so that nobody will use it."""
        ...

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent brings the bytes along; else the sender writes them itself."""
        ...


@dataclass(frozen=True, slots=True)
class Hear:
    """The core may hear this now. Of a KvSent that came with payloads there are none left: its pages are filled."""

    peer: PeerId
    message: AnyMessage
    payloads: Sequence[Payload]


@dataclass(frozen=True, slots=True)
class Tell:
    """This may be sent now."""

    to: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A transfer whose KV is not what was sent."""

    transfer: TransferId
    text: str


@dataclass(frozen=True, slots=True)
class Accuse:
    """Whoever answered our Find `call` should look at its blocks at these places."""

    to: PeerId
    call: int
    blocks: tuple[int, ...]


Verdict = Hear | Tell | Corrupt | Accuse


@dataclass(slots=True, eq=False)
class _Sent:
    """One KvSent, until the core hears of it or its transfer is over."""

    peer: PeerId
    message: KvSent
    number: int
    """Its serial, else in the order of arrival: of two that cover one page the greater counts."""
    pages: tuple[int, ...]
    """Ours that it fills, span by span."""
    final: bool = False
    """All copies have ended and all that came is written: what is wrong now stays wrong."""


@dataclass(slots=True)
class _Transfer:
    """What is held of one transfer. Leaves with its HandOver, by a mismatch, or when the core has ended it."""

    peer: PeerId
    newest: dict[int, int] = field(default_factory=dict)
    """Page -> number of the last KvSent that covers it."""
    n_reading: int = 0
    suspects: list[_Sent] = field(default_factory=list)
    handover: HandOver | None = None
    handed_ms: float = 0.0
    """When that came, for the first time."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Found with bytes that came."""

    peer: PeerId
    message: Found
    payloads: Sequence[Payload]


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Found that is to be sent, and names our pages."""

    to: PeerId
    message: Found


class KvVerifier:
    """Owns what is held back: by ticket what is being read, by transfer what waits for its HandOver. The loop's thread's."""

    def __init__(self, post: Post, grants: Grants, fill: Fill, layers: int, log: Log, clock: Clock) -> None:
        """`post`: to the thread. `fill`: writes a payload into our pages, now."""
        self._post, self._grants, self._fill, self._layers, self._log = post, grants, fill, layers, log
        self._clock = clock
        self._reading: dict[int, _Sent | _Answer | _Leaving] = {}
        self._transfers: dict[TransferId, _Transfer] = {}
        self._numbers = 0
        self._checked_pages = self._unchecked_pages = 0
        self._mismatches = {"handover": 0, "fetch": 0, "park": 0}

    # -- what comes

    def holds(self, peer: PeerId, message: AnyMessage, payloads: Sequence[Payload]) -> bool:
        """Whether the core must not hear this yet. Raises ProtocolViolation for checksums of another shape than the pages."""
        match message:
            case KvSent():
                return self._on_sent(peer, message, payloads)
            case HandOver():
                return self._on_handover(peer, message)
            case Found():
                return self._on_found(peer, message, payloads)
            case _:
                return False

    def _on_sent(self, peer: PeerId, message: KvSent, payloads: Sequence[Payload]) -> bool:
        grant = self._grants.grant_of(message.transfer, peer)
        if grant is None or grant.epoch != message.epoch or not _fits(grant, message):
            return False  # the core says what is wrong with it
        counts = [n_pages(span) for span in message.spans]
        if not message.checksums:
            self._unchecked_pages += sum(counts)
            return False
        if [len(sums) for sums in message.checksums] != counts:
            raise ProtocolViolation(f"transfer {message.transfer}: checksums of another shape than its spans {counts}")
        self._numbers += 1
        number = message.serial or self._numbers
        transfer = self._transfers.setdefault(message.transfer, _Transfer(peer))
        rows = [granted_pages(grant, span) for span in message.spans]
        filled = payloads if self._grants.wants_payloads(message.transfer) else ()
        for row, payload in zip(rows, filled, strict=False):  # before it is checked: so the check sees this copy too
            self._fill_newer(transfer, number, row, payload)
        pages = tuple(chain.from_iterable(rows))
        for page in pages:
            transfer.newest[page] = max(number, transfer.newest.get(page, 0))
        sent = _Sent(peer, message, number, pages)
        self._checked_pages += len(pages)
        self._read_sent(transfer, sent)
        return True

    def _fill_newer(self, transfer: _Transfer, number: int, pages: Sequence[int], payload: Payload) -> None:
        """Write what is no older than what lies there."""
        newer = [transfer.newest.get(page, 0) <= number for page in pages]
        if all(newer):
            self._fill(pages, payload)
            return
        whole = memoryview(payload).cast("B")
        page_bytes = len(whole) // len(pages)
        for place, page in enumerate(pages):
            if newer[place]:
                self._fill((page,), whole[place * page_bytes : (place + 1) * page_bytes])

    def _read_sent(self, transfer: _Transfer, sent: _Sent) -> None:
        transfer.n_reading += 1
        self._read(sent, Pages(sent.pages))

    def _on_handover(self, peer: PeerId, message: HandOver) -> bool:
        transfer = self._transfers.get(message.transfer)
        if transfer is None or transfer.peer != peer:
            return False
        if transfer.handover is None:
            transfer.handover, transfer.handed_ms = message, self._clock.now_ms()
        if transfer.n_reading:
            return True
        if transfer.suspects:
            self._read_again(transfer)
            return True
        del self._transfers[message.transfer]
        return False

    def _read_again(self, transfer: _Transfer) -> None:
        """All copies have ended: what did not match is read once more."""
        suspects, transfer.suspects = transfer.suspects, []
        for sent in suspects:
            sent.final = True
            self._read_sent(transfer, sent)

    def _on_found(self, peer: PeerId, message: Found, payloads: Sequence[Payload]) -> bool:
        if message.checksums and [len(row) for row in message.checksums] != [self._layers] * message.n_blocks:
            raise ProtocolViolation(
                f"Found {message.call}: checksums of another shape than its {message.n_blocks} blocks"
            )
        if not payloads or message.pages:
            return False
        if not message.checksums:
            self._unchecked_pages += message.n_blocks * self._layers
            return False
        self._checked_pages += message.n_blocks * self._layers
        self._read(_Answer(peer, message, payloads), Payloads(tuple(payloads)))
        return True

    # -- what leaves

    def seals(self, to: PeerId, message: Message) -> bool:
        """Whether this is sent later, with its checksums."""
        if not isinstance(message, Found) or not message.pages:
            return False
        self._read(_Leaving(to, message), Pages(tuple(chain.from_iterable(message.pages))))
        return True

    def _read(self, what: _Sent | _Answer | _Leaving, work: Pages | Payloads) -> None:
        self._numbers += 1
        self._reading[self._numbers] = what
        self._post(self._numbers, work)

    # -- what was read

    def on_made(self, made: ChecksumsMade) -> list[Verdict]:
        """A job of the thread has ended: what follows, in order. Raises what ended the thread, if that was our own bug."""
        if made.error is not None:
            raise made.error
        match self._reading.pop(made.ticket):
            case _Leaving(to=to, message=message):
                sums = in_rows(made.checksums, self._layers)
                return [Tell(to, msgspec.structs.replace(message, checksums=sums))]
            case _Answer() as answer:
                return self._answer(answer, made)
            case _Sent() as sent:
                return self._on_read(sent, made)

    def _answer(self, answer: _Answer, made: ChecksumsMade) -> list[Verdict]:
        """The leading run of right blocks is what was found."""
        message = answer.message
        expected = tuple(chain.from_iterable(message.checksums))
        wrong = list(range(len(expected))) if made.problem else wrong_places(expected, made.checksums)
        if not wrong:
            return [Hear(answer.peer, message, answer.payloads)]
        self._count("fetch", answer.peer, len(wrong), call=message.call, pages=wrong[:8])
        n_blocks = wrong[0] // self._layers
        shorter = msgspec.structs.replace(message, n_blocks=n_blocks, tiers=message.tiers[:n_blocks], more=False)
        blocks = tuple(sorted({place // self._layers for place in wrong}))
        # After the core, which may give back what pins them.
        heard = Hear(answer.peer, shorter, answer.payloads[:n_blocks])
        return [heard, Accuse(answer.peer, message.call, blocks)]

    def _on_read(self, sent: _Sent, made: ChecksumsMade) -> list[Verdict]:
        name = sent.message.transfer
        transfer = self._transfers.get(name)
        if transfer is None or self._grants.grant_of(name, sent.peer) is None:
            self._transfers.pop(name, None)  # whatever ended it, nobody will use these pages
            return [Hear(sent.peer, sent.message, ())]
        transfer.n_reading -= 1
        wrong = self._wrong(transfer, sent, made)
        verdicts: list[Verdict] = []
        if not wrong:
            verdicts.append(Hear(sent.peer, sent.message, ()))
        elif sent.final:
            return [self._condemn(sent, wrong)]
        else:
            transfer.suspects.append(sent)
        if transfer.handover is None or transfer.n_reading:
            return verdicts
        if transfer.suspects:
            self._read_again(transfer)
            return verdicts
        del self._transfers[name]
        return [*verdicts, Hear(sent.peer, self._with_our_time(transfer.handover, transfer.handed_ms), ())]

    def _with_our_time(self, handover: HandOver, handed_ms: float) -> HandOver:
        """For as long as it was held here, its KV was on its way."""
        held_ms = max(0.0, self._clock.now_ms() - handed_ms)
        timings = msgspec.structs.replace(handover.timings, transfer_ms=handover.timings.transfer_ms + held_ms)
        return msgspec.structs.replace(handover, timings=timings)

    def _wrong(self, transfer: _Transfer, sent: _Sent, made: ChecksumsMade) -> list[int]:
        """Places of pages that do not match and that no later KvSent covers."""
        expected: Checksums = tuple(chain.from_iterable(sent.message.checksums))
        wrong = list(range(len(expected))) if made.problem else wrong_places(expected, made.checksums)
        return [place for place in wrong if transfer.newest[sent.pages[place]] == sent.number]

    def _condemn(self, sent: _Sent, wrong: list[int]) -> Corrupt:
        message = sent.message
        del self._transfers[message.transfer]
        where = [_place(message, place) for place in wrong]
        self._count("handover", sent.peer, len(wrong), transfer=message.transfer, layer_and_block=where[:8])
        text = f"{len(wrong)} pages that came from {sent.peer} are not what it sent; first layer and block: {where[0]}"
        return Corrupt(message.transfer, text)

    # -- what was moved by others

    def on_fetched(self, job: FetchJob, done: BlockJobDone) -> None:
        """A fetch of the block mover has ended."""
        self._checked_pages += done.checked_pages
        self._unchecked_pages += done.unchecked_pages
        if done.wrong_pages:
            self._count("park" if job.peer == HOST_BUFFER else "fetch", job.peer, done.wrong_pages, call=job.call)

    def _count(self, path: str, peer: PeerId, n_wrong: int, **more: object) -> None:
        self._mismatches[path] += n_wrong
        self._log.event("kv_mismatch", path=path, peer=peer, n_pages=n_wrong, **more)

    # -- state for others

    def on_tick(self) -> None:
        """Forget what is held of transfers that the core has ended."""
        for name, transfer in list(self._transfers.items()):
            if self._grants.grant_of(name, transfer.peer) is None:
                del self._transfers[name]

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "kv_checked_pages_total": float(self._checked_pages),
            "kv_unchecked_pages_total": float(self._unchecked_pages),
            **{f"kv_mismatches_total{{path={path}}}": float(n) for path, n in self._mismatches.items()},
        }

    def gauges(self) -> dict[str, float]:
        """As in reports: messages that are held for their checksums, and transfers of which something is held or known.

        0 when nothing comes and nothing leaves; one that stays is a message that nobody will hear.
        """
        return {"kv_checks_open": float(len(self._reading) + len(self._transfers))}


def _fits(grant: Grant, message: KvSent) -> bool:
    coverage = Coverage(len(grant.pages), grant.first_block, grant.first_block + len(grant.pages[0]))
    return all(coverage.fits(span) for span in message.spans)


def _place(message: KvSent, place: int) -> tuple[int, int]:
    """Layer and block of a page of a KvSent."""
    for span in message.spans:
        if place < n_pages(span):
            return span.layer + place % span.n_layers, span.first_block + place // span.n_layers
        place -= n_pages(span)
    raise AssertionError("a place behind the last page")
