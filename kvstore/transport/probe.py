"""Which way KV travels to a peer, found by trying."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import PeerFailed, ProtocolViolation
from common.ids import PeerId, peer_id
from common.messages.handover import Probe, Probed
from common.messages.liveness import Member, TransportReport
from common.net.sockets import Payload
from kvstore.transport.channel import Channel
from kvstore.transport.descriptions import MappedPages
from kvstore.transport.device_channel import DeviceChannel
from kvstore.transport.own_pages import HostPages, OwnPages
from kvstore.transport.pinned_mapping import PinDriver, PinnedMapping
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
    mapping: MappedPages | None = None
    """What `Share.hang_up` ends if the channel is not wanted after all; None over tcp."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What this process has to reach others with. `own` is the copier thread's."""

    own: OwnPages
    share: Share
    wanted: str = "auto"
    """auto, cuda_ipc, shm or tcp."""
    pin_driver: PinDriver | None = None
    """Pins mapped files for our device; None: on a CPU."""


def open_channel(mine: Member, theirs: Member, ways: Ways) -> OpenedChannel:
    """Memory that both sides map where a test write arrives, else tcp, with the reason.

    Raises PeerFailed if a way was asked for by name and does not work. A KV store's memory is a file: where cuda_ipc is
    asked for, which is between devices, a store is reached as it can be.
    """
    peer = peer_id(theirs.id, theirs.incarnation)
    kind = "cuda_ipc" if theirs.share_kind == "cuda" else "shm"
    wanted = "auto" if ways.wanted == "cuda_ipc" and theirs.role == "kvstore" else ways.wanted
    if wanted == "tcp":
        return _open_tcp(peer, ways.own, "chosen by --transport=tcp")
    try:
        if wanted not in ("auto", kind):
            raise PeerFailed(f"it shares {'device memory' if kind == 'cuda_ipc' else 'a file in host memory'}")
        return _open_mapped(mine, theirs, ways)
    except PeerFailed as error:
        reason = f"{error}{_between_devices(mine, theirs)}"
        if wanted != "auto":
            raise PeerFailed(f"--transport={wanted} does not work with {peer}: {reason}") from error
        return _open_tcp(peer, ways.own, reason)


def _between_devices(mine: Member, theirs: Member) -> str:
    """For reasons: whether two devices have to reach each other."""
    if not mine.device_uuid or not theirs.device_uuid or mine.device_uuid == theirs.device_uuid:
        return ""
    return f" (from our device {mine.device_uuid} to its device {theirs.device_uuid})"


def _open_tcp(peer: PeerId, own: OwnPages, reason: str) -> OpenedChannel:
    channel = TcpChannel(own.rows) if isinstance(own, HostPages) else StagedChannel(own)
    return OpenedChannel(channel, TransportReport(peer=peer, kind="tcp", gib_per_s=0.0, reason=reason))


def _open_mapped(mine: Member, theirs: Member, ways: Ways) -> OpenedChannel:
    """Raises PeerFailed, with nothing left mapped."""
    own, peer = ways.own, peer_id(theirs.id, theirs.incarnation)
    if theirs.share_kind == "cuda" and isinstance(own, HostPages):
        raise PeerFailed(f"the pages of {peer} lie on a device, ours on the host")
    target = map_pages(mine, theirs, own.layout.page_bytes, ways.share)
    reason = ""
    if isinstance(own, HostPages):
        if not isinstance(target, SharedPages):
            ways.share.hang_up(peer, target)
            raise PeerFailed(f"{peer} shares another kind of memory than it says")
        channel: Channel = ShmChannel(own.rows, target)
    else:
        reason = _pin(target, ways)
        channel = DeviceChannel(own, target)
    report = TransportReport(peer=peer, kind=target.kind, gib_per_s=round(target.gib_per_s, 3), reason=reason)
    return OpenedChannel(channel, report, target)


def _pin(target: MappedPages, ways: Ways) -> str:
    """Let our device reach a mapped file, if the system allows it; else why copies go through buffers of ours."""
    driver, device = ways.pin_driver, ways.own.device
    if not isinstance(target, SharedPages) or driver is None:
        return ""
    try:
        target.pin(lambda pages: PinnedMapping(driver, pages, device))
    except PeerFailed as error:
        return f"through pinned buffers, because the mapping could not be pinned: {error}"
    return ""


def map_pages(mine: Member, theirs: Member, page_bytes: int, share: Share) -> MappedPages:
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
