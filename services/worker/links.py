"""How this worker's KV travels: channels to peers, their probing, and the payloads on their way. Shell side.

Owns the copier and the share. Used by the loop's thread; opening a channel takes milliseconds and runs beside it.
"""

import itertools
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from common.clock import Clock
from common.errors import KvCorrupt, PeerFailed
from common.ids import PeerId, TransferId
from common.kv_layout import KvLayout
from common.log import Log
from common.messages.base import Message
from common.messages.blocks import Found, Put, Stored
from common.messages.handover import KvSent, KvSpan, Probed
from common.messages.liveness import Member, TransportReport
from common.net.fault_kit import FaultKit
from common.net.sockets import Exchange, Payload
from kvstore.index.ledger import PageIds
from kvstore.transport.block_jobs import BlockJob, BlockJobDone, FetchJob, StoreJob
from kvstore.transport.block_mover import BlockMover
from kvstore.transport.checksums import checksums_of, in_rows
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.faulty import FaultyChannel
from kvstore.transport.own_pages import OwnPages
from kvstore.transport.probe import OpenedChannel, TcpProbe, Ways, open_channel
from kvstore.transport.share import Share
from services.worker.core.actions import BeginRing, Copy, FetchBlocks, OpenRing, StoreBlocks
from services.worker.inbox import ChannelFailed, ChannelOpened, ChannelTried, Events
from services.worker.known_checksums import KnownChecksums
from services.worker.sent_checksums import SentChecksums

_MEASURE_WITHIN_MS = 5_000.0


@dataclass(frozen=True, slots=True)
class Movers:
    """What moves KV, each with a thread of its own."""

    share: Share
    copier: Copier
    blocks: BlockMover


@dataclass(slots=True)
class _Attempt:
    """One thread that opens a channel. Leaves when its result is heard, which takes seconds at most."""

    role: str
    """Of the peer."""
    wanted: bool = True
    """False once the channel was closed before it was open."""
    then: Member | None = None
    """Whom to open next: there is one attempt per peer at a time, so a late one cannot end a newer one's mapping."""


class Links:
    """Opens channels, posts copies, keeps payloads until their KvSent leaves.

    Owns `_attempts`: channels being opened. Owns `_unmeasured` and `_probes`: open tcp channels whose rate was never
    asked for, and those whose answer is awaited, for `_MEASURE_WITHIN_MS`. `close_channel` ends all of it.
    """

    def __init__(
        self,
        mine: Member,
        pages: OwnPages,
        movers: Movers,
        inbox: Events,
        ways: Ways,
        faults: FaultKit | None = None,
    ) -> None:
        """`pages`: the loop thread's. `ways`: how channels are opened, with the pages of the copier's thread.

        `faults`: what copies meet on purpose.
        """
        self._mine, self._pages, self._inbox, self._ways = mine, pages, inbox, ways
        self._faults = faults
        self._share, self._copier, self._mover = movers.share, movers.copier, movers.blocks
        self._log = Log(process=mine.id)
        self._payloads: dict[tuple[TransferId, KvSpan], Payload] = {}
        self.sent = SentChecksums()
        """Of our pages, as they were copied to decode workers."""
        self.known = KnownChecksums()
        """Of pages that are not ours; told of what comes and goes by this class."""
        self._serials = itertools.count(1)  # in the order of the copies
        self._jobs: dict[int, BlockJob] = {}
        self._attempts: dict[PeerId, _Attempt] = {}
        self._unmeasured: set[PeerId] = set()
        self._probes: dict[PeerId, TcpProbe] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._pages.layout.page_bytes

    @property
    def layout(self) -> KvLayout:
        """Of our pages."""
        return self._pages.layout

    @property
    def block_bytes(self) -> int:
        """Bytes of one token block over all layers."""
        return self.page_bytes * self._pages.layout.layers

    def open(self, peer: PeerId, member: Member) -> None:
        """Find a way to `peer`; the inbox gets ChannelTried, which is for `on_tried`."""
        running = self._attempts.get(peer)
        if running is not None:
            running.wanted, running.then = False, member
            return
        self._attempts[peer] = _Attempt(member.role)
        threading.Thread(target=self._open, args=(peer, member), name=f"open {peer}", daemon=True).start()

    def _open(self, peer: PeerId, member: Member) -> None:
        try:
            opened = open_channel(self._mine, member, self._ways)
        except PeerFailed as error:
            self._inbox.put(ChannelTried(peer, str(error)))
            return
        self._inbox.put(ChannelTried(peer, opened))

    def on_tried(self, tried: ChannelTried) -> ChannelOpened | ChannelFailed | None:
        """An attempt ended: what to tell the core now; None if nobody waits for this one any more."""
        peer, outcome = tried.peer, tried.outcome
        attempt = self._attempts.pop(peer)
        if attempt.wanted and isinstance(outcome, OpenedChannel):
            channel = outcome.channel
            if self._faults is not None:
                channel = FaultyChannel(channel, self._faults, peer, outcome.mapping)
            self._copier.attach(peer, channel)
            if outcome.mapping is not None:
                self._mover.attach(peer, outcome.mapping)
            if outcome.report.kind == "tcp" and attempt.role != "kvstore":
                self._unmeasured.add(peer)
            return ChannelOpened(outcome.report)
        if attempt.wanted:
            return ChannelFailed(peer, str(outcome))
        if isinstance(outcome, OpenedChannel):
            outcome.channel.close()
            if outcome.mapping is not None:
                self._share.hang_up(peer, outcome.mapping)
        if attempt.then is not None:
            self.open(peer, attempt.then)
        return None

    def measure(self, report: TransportReport, exchange: Exchange, clock: Clock) -> bool:
        """True if the report must not be announced: its rate is being measured, or the channel was closed meanwhile.

        Each tcp channel is measured once; if that fails it is announced, and used, with the rate 0.
        """
        peer = report.peer
        if self._copier.kind(peer) is None:
            return True
        if peer not in self._unmeasured:
            return False
        self._unmeasured.remove(peer)
        probe = TcpProbe(report, secrets.randbits(63), clock.now_ms())
        message, payloads = probe.message
        if not exchange.send(peer, message, payloads):
            return False
        self._probes[peer] = probe
        return True

    def on_tick(self, now_ms: float) -> None:
        """Wait no longer for lost measurements: the inbox gets ChannelOpened without a rate."""
        late = [peer for peer, probe in self._probes.items() if now_ms - probe.began_ms >= _MEASURE_WITHIN_MS]
        for peer in late:
            self._inbox.put(ChannelOpened(self._probes.pop(peer).opened))

    def on_probed(self, peer: PeerId, message: Probed, now_ms: float) -> None:
        """The peer answered the test payload; the inbox gets ChannelOpened with the rate."""
        probe = self._probes.get(peer)
        if probe is None or probe.nonce != message.nonce:
            return  # too late, or of an earlier connection
        del self._probes[peer]
        try:
            self._inbox.put(ChannelOpened(probe.on_probed(message, now_ms)))
        except PeerFailed as error:
            self._inbox.put(ChannelFailed(peer, str(error)))

    def close_channel(self, peer: PeerId) -> None:
        """Nothing is written to the peer after the copy in progress; its memory is unmapped."""
        attempt = self._attempts.get(peer)
        if attempt is not None:
            attempt.wanted, attempt.then = False, None
        self._unmeasured.discard(peer)
        self._probes.pop(peer, None)
        self._copier.detach(peer)
        self._mover.detach(peer)
        self._share.hang_up(peer)
        self.known.forget(peer)
        self.sent.forget(peer)

    def copy(self, action: Copy) -> None:
        """Hand a copy to the copier; the inbox gets CopyEnded."""
        order = action.order
        job = CopyJob(order.transfer, order.to, order.span, action.source_pages, order.target_pages)
        self._copier.post(job)

    def move_blocks(self, action: FetchBlocks | StoreBlocks) -> None:
        """Hand a job to the block mover; the inbox gets BlocksMoved, also if it could not begin."""
        if isinstance(action, FetchBlocks):
            job: BlockJob = FetchJob(
                action.call,
                action.peer,
                action.own_pages,
                action.peer_pages,
                action.deadline_ms,
                action.by_layer,
                action.layers,
                self.known.expected(action.peer, action.call, action.peer_pages),
            )
        else:
            own, theirs = action.own_pages, action.peer_pages
            job = StoreJob(action.call, action.peer, own, theirs, action.ring, action.free_layer)
        self._jobs[job.call] = job
        self._mover.post(job)

    def moved_blocks(self, done: BlockJobDone) -> BlockJob:
        """A job that the block mover was handed has ended: which. What it stored is known from now on."""
        job = self._jobs.pop(done.call)
        if done.ok and done.checksums and isinstance(job, StoreJob):
            self.known.on_stored(job, done.checksums)
        return job

    def begin_ring(self, action: BeginRing) -> None:
        """Hold the engine back before it writes what has not been copied."""
        self._mover.begin_ring(action.ring, action.free_layer)

    def open_ring(self, action: OpenRing) -> None:
        """Let it write more."""
        self._mover.open_ring(action.ring, action.free_layer)

    def fill_blocks(self, own_pages: PageIds, payloads: Sequence[Payload], *, verify: bool = False) -> None:
        """Write one payload per block into our own pages [blocks, layers].

        `verify`: read them back. Raises KvCorrupt: memory that does not keep what is written to it serves nobody.
        """
        for pages, payload in zip(own_pages.tolist(), payloads, strict=False):
            self.fill(pages, payload)
            # The bytes' own comparison is one memcmp; a memoryview's goes element by element, 70 times slower.
            if verify and self._pages.read(pages) != payload:
                raise KvCorrupt(f"our pages {pages[:4]}... do not hold what was written to them a moment ago")

    def sealed(self, message: Found | Put, own_pages: PageIds) -> Found | Put:
        """With the checksums of our own pages [blocks, layers], which follow as payloads.

        Of the pages themselves and in the loop's thread: they may be somebody else's as soon as it goes on.
        """
        sums = checksums_of(self._pages, own_pages.reshape(-1))
        return msgspec.structs.replace(message, checksums=in_rows(sums, own_pages.shape[1]))

    def read_blocks(self, own_pages: PageIds) -> list[Payload]:
        """One payload per block of our own pages [blocks, layers]."""
        return [self._pages.read(pages) for pages in own_pages.tolist()]

    def keep_payload(self, done: CopyDone) -> None:
        """Keep what must travel with the KvSent that the core is about to send."""
        if done.payload is not None:
            self._payloads[done.job.transfer, done.job.span] = done.payload
        if done.checksums:
            self.sent.on_copied(done.job.to, done.job.transfer, done.job.span, done.checksums)

    def forget_payload(self, done: CopyDone) -> None:
        """The core has reacted to the copy: if it sent nothing, nobody wants the payload."""
        self._payloads.pop((done.job.transfer, done.job.span), None)

    def note_heard(self, peer: PeerId, message: Message) -> None:
        """What peers say begins and ends the use of checksums."""
        self.sent.note(message)
        if isinstance(message, Found | Stored):
            self.known.on_answer(peer, message)

    def with_checksums(self, to: PeerId, message: Message) -> Message:
        """The message as it shall be sent: KvSent and Publish say what was copied."""
        if isinstance(message, KvSent):
            found = self.sent.of(message)
            return msgspec.structs.replace(message, checksums=found, serial=next(self._serials)) if found else message
        self.sent.note(message)
        return self.known.told(to, message)

    def payloads_for(self, message: Message) -> list[Payload]:
        """The frames that follow a message."""
        if not isinstance(message, KvSent) or not self._payloads:
            return []
        found = [self._payloads.pop((message.transfer, span), None) for span in message.spans]
        return [payload for payload in found if payload is not None]

    def fill(self, pages: Sequence[int], payload: Payload) -> None:
        """Write a received payload into our own pages."""
        self._pages.write(pages, payload)

    def tell_resized(self, on_settled: Callable[[], None]) -> None:
        """Our page memory has changed: peers that map it follow, then `on_settled` runs in the share's thread."""
        self._share.resized(on_settled)

    def close(self) -> None:
        """End the movers and every mapping."""
        self._mover.stop()
        self._copier.stop()
        self._share.close()
