"""The two state machines of a hand-over, as tables. Only `advance` changes a state.

kvstore/README.md shows the diagrams; a test keeps them equal to `mermaid()`.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from common.errors import ProtocolViolation


class ReceiverState(Enum):
    """Decode side."""

    ASKED = "asked"  # a prefill worker waits for pages; none are given yet
    FILLING = "filling"  # pages granted; their writer may be writing
    STOPPING = "stopping"  # given up; pages quarantined until the writer has stopped or died
    DELIVERED = "delivered"  # pages belong to the request; terminal
    RELEASED = "released"  # pages went back; terminal


class ReceiverEvent(Enum):
    """What moves the decode side."""

    GRANT = "grant"
    KV = "kv"
    COMPLETE = "complete"  # every layer of every block, and HandOver
    STOP_WRITER = "stop_writer"  # given up while another process may write
    STOP_SELF = "stop_self"  # given up, and nobody else writes
    WRITER_STOPPED = "writer_stopped"  # Stopped, Abort, or the kernel's news of its death


class SenderState(Enum):
    """Prefill side."""

    ASKING = "asking"  # GrantRequest sent
    FILLING = "filling"  # granted; copies run as layers are computed
    HANDING_OVER = "handing_over"  # HandOver sent; Commit awaited
    DRAINING = "draining"  # ended, but copies still in flight
    CLOSED = "closed"  # source pages released; terminal


class SenderEvent(Enum):
    """What moves the prefill side."""

    GRANT = "grant"
    COPY = "copy"
    ALL_SENT = "all_sent"  # everything computed and copied
    END = "end"  # Commit, Stop, cancel, deadline or death, with no copy in flight
    END_IN_FLIGHT = "end_in_flight"  # the same, with copies in flight
    DRAINED = "drained"


RECEIVER: Mapping[tuple[ReceiverState, ReceiverEvent], ReceiverState] = {
    (ReceiverState.ASKED, ReceiverEvent.GRANT): ReceiverState.FILLING,
    (ReceiverState.ASKED, ReceiverEvent.STOP_SELF): ReceiverState.RELEASED,
    (ReceiverState.ASKED, ReceiverEvent.WRITER_STOPPED): ReceiverState.RELEASED,
    (ReceiverState.FILLING, ReceiverEvent.KV): ReceiverState.FILLING,
    (ReceiverState.FILLING, ReceiverEvent.COMPLETE): ReceiverState.DELIVERED,
    (ReceiverState.FILLING, ReceiverEvent.STOP_WRITER): ReceiverState.STOPPING,
    (ReceiverState.FILLING, ReceiverEvent.STOP_SELF): ReceiverState.RELEASED,
    (ReceiverState.FILLING, ReceiverEvent.WRITER_STOPPED): ReceiverState.RELEASED,
    (ReceiverState.STOPPING, ReceiverEvent.WRITER_STOPPED): ReceiverState.RELEASED,
}

SENDER: Mapping[tuple[SenderState, SenderEvent], SenderState] = {
    (SenderState.ASKING, SenderEvent.GRANT): SenderState.FILLING,
    (SenderState.ASKING, SenderEvent.END): SenderState.CLOSED,
    (SenderState.FILLING, SenderEvent.COPY): SenderState.FILLING,
    (SenderState.FILLING, SenderEvent.ALL_SENT): SenderState.HANDING_OVER,
    (SenderState.FILLING, SenderEvent.END): SenderState.CLOSED,
    (SenderState.FILLING, SenderEvent.END_IN_FLIGHT): SenderState.DRAINING,
    (SenderState.HANDING_OVER, SenderEvent.COPY): SenderState.HANDING_OVER,
    (SenderState.HANDING_OVER, SenderEvent.END): SenderState.CLOSED,
    (SenderState.HANDING_OVER, SenderEvent.END_IN_FLIGHT): SenderState.DRAINING,
    (SenderState.DRAINING, SenderEvent.COPY): SenderState.DRAINING,
    (SenderState.DRAINING, SenderEvent.DRAINED): SenderState.CLOSED,
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


def advance(table: Mapping[tuple[S, E], S], state: S, event: E) -> S:
    """The state after `event`. Raises ProtocolViolation if the table does not allow it."""
    try:
        return table[state, event]
    except KeyError:
        raise ProtocolViolation(f"{event.value} is not allowed in {state.value}") from None


def mermaid(table: Mapping[tuple[S, E], S]) -> str:
    """The diagram of one table."""
    arrows = [f"    {source.value} --> {target.value}: {event.value}" for (source, event), target in table.items()]
    return "\n".join(["stateDiagram-v2", *arrows])
