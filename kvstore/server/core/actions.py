"""What a KV store's core asks of its shell. All actions of one call are performed in order, before the next call."""

from dataclasses import dataclass

from common.ids import PeerId
from common.kv_layout import KvLayout
from common.messages.base import Message
from common.messages.blocks import BlockName

Pages = tuple[int, ...]
"""Pages of one block, layer by layer."""


@dataclass(frozen=True, slots=True)
class Write:
    """Copy the payload frame `frame` of the message in hand into these pages."""

    pages: Pages
    frame: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a message, followed by one payload frame per block of `blocks`."""

    to: PeerId
    message: Message
    blocks: tuple[Pages, ...] = ()


@dataclass(frozen=True, slots=True)
class ShapeMemory:
    """The layout is known: number `n_pages` pages from the beginning of the memory, and share them."""

    layout: KvLayout
    n_pages: int


@dataclass(frozen=True, slots=True)
class ScanDisk:
    """Find what lies on disk; keep the newest `limit_blocks`. Ends with `on_disk_scanned`."""

    layout: KvLayout
    limit_blocks: int


@dataclass(frozen=True, slots=True)
class WriteDisk:
    """Write a block, which stays as it is meanwhile, to disk. Ends with `on_disk_written`."""

    block: BlockName
    pages: Pages


@dataclass(frozen=True, slots=True)
class ReadDisk:
    """Read a block from disk into pages that nobody else uses. Ends with `on_disk_read`."""

    block: BlockName
    pages: Pages


@dataclass(frozen=True, slots=True)
class DeleteDisk:
    """Delete a block's file, before any later write."""

    name: bytes


@dataclass(frozen=True, slots=True)
class DiskPaused:
    """Worth a log line: nothing is written to disk for `for_ms`."""

    text: str
    for_ms: float


Action = Write | Reply | ShapeMemory | ScanDisk | WriteDisk | ReadDisk | DeleteDisk | DiskPaused
DiskJob = ScanDisk | WriteDisk | ReadDisk | DeleteDisk
