"""Events from a worker's threads to its loop."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.ids import PeerId
from common.messages.liveness import Member, TransportReport
from common.net.inbox import Inbox
from kvstore.transport.block_jobs import BlockEvent
from kvstore.transport.copier import CopyDone
from kvstore.transport.probe import OpenedChannel
from services.worker.checksum_thread import ChecksumsMade
from services.worker.core.plan import StepResult


@dataclass(frozen=True, slots=True)
class LayerDone:
    """The engine wrote K and V of a layer of the step it computes, or of several that follow one another."""

    layer: int
    n_layers: int = 1


@dataclass(frozen=True, slots=True)
class StepDone:
    """The engine finished a step."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine raised: a bug or a broken device. The process ends with this traceback."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class ShareDied:
    """Our own bug ended the share's thread: deaths of peers would go unheard. The process ends with this traceback."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """The copier finished a job, well or not."""

    done: CopyDone


@dataclass(frozen=True, slots=True)
class BlocksMoved:
    """The block mover has news: of one layer, or the end of a job."""

    event: BlockEvent


@dataclass(frozen=True, slots=True)
class MembersRead:
    """The membership as Redis had it at `read_ms` of the process's clock: the loop may hear of it much later."""

    members: list[Member]
    read_ms: float


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The kernel closed the memory socket of a peer: it maps our memory no more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class HostGone:
    """A peer whose memory was mapped here has ended that; it may still map ours."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class ChannelTried:
    """An attempt to open a channel ended, with the channel or the reason why not. For `Links.on_tried` alone."""

    peer: PeerId
    outcome: OpenedChannel | str


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """A channel to a peer is attached."""

    report: TransportReport


@dataclass(frozen=True, slots=True)
class ChannelFailed:
    """No allowed way to a peer works."""

    peer: PeerId
    text: str


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A peer is about to map our memory."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class MemoryChanged:
    """A ResizeMemory has ended, and every peer knows."""

    n_pages: int
    """That there is memory for now."""
    problem: str
    """Why not for as many as were ordered; empty: for these."""


@dataclass(frozen=True, slots=True)
class ChunksBack:
    """A TakeBackChunks from the system has ended."""

    chunks: tuple[int, ...]
    problem: str
    """Why they have no memory; empty: they have."""


Event = (
    LayerDone
    | StepDone
    | EngineDied
    | ShareDied
    | CopyEnded
    | BlocksMoved
    | MembersRead
    | PeerGone
    | HostGone
    | PeerJoined
    | ChannelTried
    | ChannelOpened
    | ChannelFailed
    | MemoryChanged
    | ChunksBack
    | ChecksumsMade
)

Events = Inbox[Event]
"""What the loop takes from."""


def joined(events: Sequence[Event]) -> list[Event]:
    """The same news, with layers that follow one another told at once: one copy moves them sooner than many."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, LayerDone) and isinstance(last, LayerDone) and event.layer == last.layer + last.n_layers:
            found[-1] = LayerDone(last.layer, last.n_layers + event.n_layers)
        else:
            found.append(event)
    return found
