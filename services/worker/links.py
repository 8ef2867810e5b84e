"""How this worker's KV travels: channels to peers, their probing, and the payloads on their way. Shell side.

Owns the copier and the share. Used by the loop's thread; opening a channel takes milliseconds and runs beside it.
"""

import secrets
import threading
from collections.abc import Sequence

from common.clock import Clock
from common.errors import PeerFailed
from common.ids import PeerId, TransferId
from common.log import Log
from common.messages.base import Message
from common.messages.handover import KvSent, KvSpan, Probed
from common.messages.liveness import Member, TransportReport
from common.net.sockets import Exchange, Payload
from kvstore.memory.device import DevicePages
from kvstore.memory.page_pool import PagePool
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.probe import TcpProbe, open_channel
from kvstore.transport.share import Share
from kvstore.transport.tcp import write_payload
from services.worker.core.actions import Copy
from services.worker.inbox import ChannelFailed, ChannelOpened, Inbox


class Links:
    """Opens channels, posts copies, keeps payloads until their KvSent leaves."""

    def __init__(
        self, mine: Member, pages: PagePool | DevicePages, share: Share, copier: Copier, inbox: Inbox, *, transport: str
    ) -> None:
        self._mine, self._pages, self._share, self._copier = mine, pages, share, copier
        self._inbox, self._transport = inbox, transport
        self._log = Log(process=mine.id)
        self._payloads: dict[tuple[TransferId, KvSpan], Payload] = {}
        self._probes: dict[PeerId, TcpProbe] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._pages.layout.page_bytes

    def open(self, peer: PeerId, member: Member) -> None:
        """Find a way to `peer`; the inbox gets ChannelOpened, or ChannelFailed."""
        threading.Thread(target=self._open, args=(peer, member), name=f"open {peer}", daemon=True).start()

    def _open(self, peer: PeerId, member: Member) -> None:
        try:
            opened = open_channel(self._mine, member, self._pages, self._share, self._transport)
        except PeerFailed as error:
            self._inbox.put(ChannelFailed(peer, str(error)))
            return
        self._copier.attach(peer, opened.channel)
        self._inbox.put(ChannelOpened(opened.report))

    def measure(self, report: TransportReport, exchange: Exchange, clock: Clock) -> bool:
        """Start measuring an opened tcp channel; False if its rate is known already."""
        if report.kind != "tcp" or report.gib_per_s:
            return False
        probe = TcpProbe(report, secrets.randbits(63), clock.now_ms())
        self._probes[report.peer] = probe
        message, payloads = probe.message
        exchange.send(report.peer, message, payloads)
        return True

    def on_probed(self, peer: PeerId, message: Probed, now_ms: float) -> None:
        """The peer answered the test payload; the inbox gets ChannelOpened with the rate."""
        probe = self._probes.pop(peer, None)
        if probe is None:
            return
        try:
            self._inbox.put(ChannelOpened(probe.on_probed(message, now_ms)))
        except PeerFailed as error:
            self._inbox.put(ChannelFailed(peer, str(error)))

    def close_channel(self, peer: PeerId) -> None:
        """Nothing is written to the peer after the copy in progress; its memory is unmapped."""
        self._probes.pop(peer, None)
        self._copier.detach(peer)
        self._share.hang_up(peer)

    def copy(self, action: Copy) -> None:
        """Hand a copy to the copier; the inbox gets CopyEnded."""
        order = action.order
        job = CopyJob(order.transfer, order.to, order.span, action.source_pages, order.target_pages)
        self._copier.post(job)

    def keep_payload(self, done: CopyDone) -> None:
        """Keep what must travel with the KvSent that the core is about to send."""
        if done.payload is not None:
            self._payloads[done.job.transfer, done.job.span] = done.payload

    def forget_payload(self, done: CopyDone) -> None:
        """The core has reacted to the copy: if it sent nothing, nobody wants the payload."""
        self._payloads.pop((done.job.transfer, done.job.span), None)

    def payloads_for(self, message: Message) -> list[Payload]:
        """The frames that follow a message."""
        if not isinstance(message, KvSent) or not self._payloads:
            return []
        found = [self._payloads.pop((message.transfer, span), None) for span in message.spans]
        return [payload for payload in found if payload is not None]

    def fill(self, pages: Sequence[int], payload: Payload) -> None:
        """Write a received payload into our own pages."""
        if isinstance(self._pages, DevicePages):
            self._pages.write(pages, payload)
        else:
            write_payload(self._pages.rows, pages, payload)

    def close(self) -> None:
        """End the copier and every mapping."""
        self._copier.stop()
        self._share.close()
