"""Where faults can strike: points named after the phases of a request, and what may be done at each.

A message strikes a point once where it is sent and once where it is heard. Work (a copy, a step, a call to Redis) strikes
it once, when everything that allows it has been checked and before it is done.
"""

from enum import StrEnum

from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.blocks import Declined, Find, Found, Offered, Publish, Put, Release, Reserve, Reserved, Stored
from common.messages.handover import (
    Abort,
    Commit,
    Grant,
    GrantPending,
    GrantRefused,
    GrantRequest,
    HandOver,
    KvSent,
    Probe,
    Probed,
    Renew,
    Stop,
    Stopped,
)
from common.messages.liveness import Drain, Hello, Ping, Refused, Report, Welcome
from common.messages.requests import AskAbout, Cancel, Failed, Generate, NotHere, StillHere, Tokens
from common.messages.resizing import Resize, ResizeAnswer


class Point(StrEnum):
    """A phase of a request, or a part of a process."""

    ROUTE = "route"
    PREFILL_QUEUE = "prefill_queue"
    LOOKUP = "lookup"
    FETCH = "fetch"
    COMPUTE = "compute"
    GRANT = "grant"
    TRANSFER = "transfer"
    HANDOVER = "handover"
    COMMIT = "commit"
    ANSWER = "answer"
    DECODE = "decode"
    SPILL = "spill"
    PARK = "park"
    CANCEL = "cancel"
    STOP_WRITING = "stop_writing"
    RENEW = "renew"
    LIVENESS = "liveness"
    MEMBERSHIP = "membership"
    MEMORY = "memory"
    DISK = "disk"
    CLOCK = "clock"


class Side(StrEnum):
    """How a point is struck."""

    SENT = "sent"
    HEARD = "heard"
    WORK = "work"


class Kind(StrEnum):
    """What goes wrong."""

    DROP = "drop"
    """A message is lost and nobody is told."""
    DELAY = "delay"
    """It comes, or is done, `ms` late."""
    REORDER = "reorder"
    """A message changes places with the next one of that peer."""
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"
    """Of KV or a file, one byte is another one; a message without KV does not parse."""
    CUT = "cut"
    """This and all that follows with that peer fails, both ways, until the rule goes."""
    FAIL = "fail"
    """A message cannot be sent; a copy, call or step raises what its own failure would raise."""
    KILL = "kill"
    """The process sends itself SIGKILL."""
    STOP = "stop"
    """The process sends itself SIGSTOP: it goes on when somebody sends SIGCONT."""
    TORN = "torn"
    """A file keeps its name and loses its second half."""
    JUMP = "jump"
    """The clock is `ms` ahead of itself from now on."""


MESSAGES: dict[Point, tuple[type[Message], ...]] = {
    Point.ROUTE: (Generate,),
    Point.LOOKUP: (Find, Found, Offered, Declined),
    Point.GRANT: (GrantRequest, Grant, GrantPending, GrantRefused),
    Point.TRANSFER: (KvSent,),
    Point.HANDOVER: (HandOver,),
    Point.COMMIT: (Commit,),
    Point.ANSWER: (Tokens, Failed, AskAbout, StillHere, NotHere),
    Point.SPILL: (Reserve, Reserved, Publish, Put, Stored),
    Point.CANCEL: (Cancel,),
    Point.STOP_WRITING: (Stop, Stopped, Abort),
    Point.RENEW: (Renew, Release),
    Point.LIVENESS: (Hello, Welcome, Refused, Ping, Report, Drain, Resize, ResizeAnswer, Probe, Probed),
}
"""Which messages strike a point. A Generate that is heard strikes `prefill_queue` as well."""

CARRY_KV = frozenset({Point.TRANSFER, Point.SPILL, Point.LOOKUP})
"""Points with messages that may be followed by KV. Unless a rule names a side, `corrupt` means the KV there."""

_ENDS = frozenset({Kind.KILL, Kind.STOP})
_OF_MESSAGES = _ENDS | {Kind.DROP, Kind.DELAY, Kind.REORDER, Kind.DUPLICATE, Kind.CORRUPT, Kind.CUT, Kind.FAIL}
_OF_CALLS = _ENDS | {Kind.DELAY, Kind.CUT, Kind.FAIL}

_AT_WORK: dict[Point, frozenset[Kind]] = {
    Point.FETCH: _OF_CALLS | {Kind.CORRUPT},
    Point.COMPUTE: _ENDS | {Kind.DELAY, Kind.FAIL},
    Point.TRANSFER: _OF_CALLS | {Kind.CORRUPT},
    Point.DECODE: _ENDS | {Kind.DELAY, Kind.FAIL},
    Point.SPILL: _OF_CALLS | {Kind.CORRUPT},
    Point.PARK: _OF_CALLS | {Kind.CORRUPT},
    Point.MEMBERSHIP: _OF_CALLS,
    Point.MEMORY: _OF_CALLS,
    Point.DISK: _OF_CALLS | {Kind.CORRUPT, Kind.TORN},
    Point.CLOCK: frozenset({Kind.JUMP}),
}


def sides_of(point: Point) -> tuple[Side, ...]:
    """How a point can be struck."""
    if point is Point.PREFILL_QUEUE:
        return (Side.HEARD,)
    messages = (Side.SENT, Side.HEARD) if point in MESSAGES else ()
    return (*messages, Side.WORK) if point in _AT_WORK else messages


def kinds_of(point: Point, side: Side | None = None) -> frozenset[Kind]:
    """What may be done there; None: on any side."""
    sides = sides_of(point) if side is None else (side,)
    found: frozenset[Kind] = frozenset()
    for one in sides:
        found |= _AT_WORK[point] if one is Side.WORK else _OF_MESSAGES
    return found


_POINT_OF: dict[type[Message], Point] = {kind: point for point, kinds in MESSAGES.items() for kind in kinds}


def points_of(message: AnyMessage | Message, side: Side) -> tuple[Point, ...]:
    """What a message strikes, in the order in which it does. Every message that crosses a socket has a point."""
    point = _POINT_OF[type(message)]
    return (point, Point.PREFILL_QUEUE) if point is Point.ROUTE and side is Side.HEARD else (point,)
