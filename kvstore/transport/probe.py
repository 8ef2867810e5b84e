"""Which way KV travels to a peer, found by trying."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import PeerFailed, ProtocolViolation
from common.ids import PeerId, peer_id
from common.messages.handover import Probe, Probed
from common.messages.liveness import Member, TransportReport
from common.net.sockets import Payload
from kvstore.memory.device import DevicePages
from kvstore.memory.page_pool import PagePool
from kvstore.transport.channel import Channel
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.shm import ShmChannel
from kvstore.transport.staged import StagedChannel
from kvstore.transport.tcp import TcpChannel

TCP_PROBE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class OpenedChannel:
    """A channel and how it was chosen. Over tcp the rate is 0 until a TcpProbe has measured it."""

    channel: Channel
    report: TransportReport
    mapping: SharedPages | None = None
    """shm: what `Share.hang_up` ends if the channel is not wanted after all."""


def open_channel(
    mine: Member, theirs: Member, pages: PagePool | DevicePages, share: Share, wanted: str = "auto"
) -> OpenedChannel:
    """Shared memory where a test write arrives, else tcp. `wanted`: auto, shm or tcp.

    Raises PeerFailed if `wanted` is shm and shared memory does not work.
    """
    peer = peer_id(theirs.id, theirs.incarnation)
    if isinstance(pages, DevicePages):
        return _open_staged(peer, pages, wanted)
    reason = "chosen by --transport=tcp"
    if wanted != "tcp":
        try:
            return _open_shm(mine, theirs, peer, pages, share)
        except PeerFailed as error:
            reason = str(error)
            if wanted == "shm":
                raise PeerFailed(f"--transport=shm does not work with {peer}: {reason}") from error
    report = TransportReport(peer=peer, kind="tcp", gib_per_s=0.0, reason=reason)
    return OpenedChannel(TcpChannel(pages.rows), report)


def _open_staged(peer: PeerId, pages: DevicePages, wanted: str) -> OpenedChannel:
    reason = f"our pages lie on {pages.tensor.device}"
    if wanted == "shm":
        raise PeerFailed(f"--transport=shm does not work with {peer}: {reason}")
    return OpenedChannel(StagedChannel(pages), TransportReport(peer=peer, kind="tcp", gib_per_s=0.0, reason=reason))


def _open_shm(mine: Member, theirs: Member, peer: PeerId, pages: PagePool, share: Share) -> OpenedChannel:
    target = map_pages(mine, theirs, pages.layout.page_bytes, share)
    report = TransportReport(peer=peer, kind="shm", gib_per_s=round(target.gib_per_s, 3))
    return OpenedChannel(ShmChannel(pages.rows, target), report, target)


def map_pages(mine: Member, theirs: Member, page_bytes: int, share: Share) -> SharedPages:
    """A peer's pages, mapped and probed. Raises PeerFailed: it shares none, is elsewhere, or has other pages."""
    peer = peer_id(theirs.id, theirs.incarnation)
    if theirs.share_path is None:
        raise PeerFailed(f"{peer} shares no memory")
    if mine.host != theirs.host:
        raise PeerFailed(f"{peer} is on another host ({theirs.host}, not {mine.host})")
    target = share.connect(peer, theirs.share_path)
    if target.description.page_bytes != page_bytes:
        share.hang_up(peer, target)
        raise PeerFailed(f"{peer} has pages of {target.description.page_bytes} bytes, not {page_bytes}")
    return target


class TcpProbe:
    """One test payload, from `message` to `on_probed`. Pure: the caller sends and tells the time."""

    def __init__(self, opened: TransportReport, nonce: int, now_ms: float) -> None:
        self.opened, self.nonce, self.began_ms = opened, nonce, now_ms
        self._payload = nonce.to_bytes(8, "little") * (TCP_PROBE_BYTES // 8)

    @property
    def message(self) -> tuple[Probe, list[Payload]]:
        """What to send."""
        return Probe(nonce=self.nonce), [self._payload]

    def on_probed(self, message: Probed, now_ms: float) -> TransportReport:
        """The report with the rate, from one round trip. Raises PeerFailed if the bytes did not arrive whole."""
        if message != Probed(nonce=self.nonce, crc32=zlib.crc32(self._payload)):
            raise PeerFailed(f"{self.opened.peer} received another payload than was sent")
        elapsed_s = max(now_ms - self.began_ms, 0.001) / 1000
        rate = round(len(self._payload) / elapsed_s / 2**30, 3)
        return TransportReport(peer=self.opened.peer, kind="tcp", gib_per_s=rate, reason=self.opened.reason)


def answer_probe(message: Probe, payloads: Sequence[Payload]) -> Probed:
    """The receiver's answer. Raises ProtocolViolation unless exactly one payload came."""
    if len(payloads) != 1:
        raise ProtocolViolation(f"a probe has one payload; {len(payloads)} came")
    return Probed(nonce=message.nonce, crc32=zlib.crc32(payloads[0]))
