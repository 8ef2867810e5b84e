"""What other threads of a KV store tell its loop."""

from dataclasses import dataclass

from common.ids import PeerId
from common.messages.blocks import BlockName
from common.messages.liveness import Member
from common.net.inbox import Inbox


@dataclass(frozen=True, slots=True)
class GuestJoined:
    """A process is about to map our memory."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class GuestGone:
    """Its last mapping is gone, by its will or with its life."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class DiskScanned:
    """The end of a ScanDisk."""

    blocks: list[BlockName]
    discarded_files: int = 0


@dataclass(frozen=True, slots=True)
class DiskWritten:
    """The end of a WriteDisk; `error_text` is empty if the file is there."""

    name: bytes
    error_text: str
    corrupt: bool = False
    """It was not written, because its pages are not what they were when they came."""


@dataclass(frozen=True, slots=True)
class DiskRead:
    """The end of a ReadDisk."""

    name: bytes
    ok: bool


@dataclass(frozen=True, slots=True)
class DiskDied:
    """Our own bug ended the disk's thread."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class ShareDied:
    """Our own bug ended the share's thread: ends of guests would go unheard."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class MembersRead:
    """The membership as Redis had it at `read_ms` of the process's clock: the loop may hear of it much later."""

    members: list[Member]
    read_ms: float


Event = GuestJoined | GuestGone | DiskScanned | DiskWritten | DiskRead | DiskDied | ShareDied | MembersRead

Events = Inbox[Event]
"""What the loop takes from."""
