"""What happened in a world, one line per event, and which of it concerns a request or a page.

    time ms   who -> whom               what                                              what the link did

Events are kept as they are and written only when somebody reads them, so that a trace costs little while all is well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from common.ids import PeerId
from common.messages.handover import Grant, GrantRequest, HandOver, KvSent, Renew
from common.messages.liveness import Hello, Member, Ping, Report, Welcome
from common.messages.requests import Generate, Sampling, Tokens

PageOf = tuple[PeerId, int]
_QUIET = (Ping, Report, Hello, Welcome)
_SHORT = 92


def short_peer(peer: str) -> str:
    """`prefill-0@3` for `prefill-0@0000000000000003`."""
    name, at, life = peer.partition("@")
    return f"{name}@{int(life, 16)}" if at and life else name


def short_peers(text: str) -> str:
    """The same, wherever a process is named."""
    return re.sub("@0*([0-9a-f]{1,4})(?![0-9a-f])", r"@\1", text)


def root_of(request: str) -> str:
    """The client's name of a request: attempts are `r3`, `r3~2`."""
    return request.partition("~")[0]


@dataclass(frozen=True, slots=True)
class Event:
    """One line."""

    at_ms: float
    who: str
    whom: str
    what: object
    """A message, or words."""
    fate: str = ""
    names: frozenset[str] = frozenset()
    """Requests and transfers."""
    pages: frozenset[PageOf] = frozenset()

    def __str__(self) -> str:
        arrow = f"{short_peer(self.who)} -> {short_peer(self.whom)}" if self.whom else short_peer(self.who)
        what = self.what if isinstance(self.what, str) else short(self.what)
        return short_peers(f"{self.at_ms:9.1f}  {arrow:27} {what}{'   [' + self.fate + ']' if self.fate else ''}")


@dataclass(slots=True)
class Trace:
    """Owns the events of one world, the oldest first."""

    events: list[Event] = field(default_factory=list)
    request_of: dict[str, str] = field(default_factory=dict)
    """Transfer -> the client's name of its request."""

    def note(self, event: Event) -> None:
        if isinstance(event.what, GrantRequest):
            self.request_of[event.what.transfer] = root_of(event.what.request)
        self.events.append(event)

    def about(self, names: Iterable[str] = (), pages: Iterable[PageOf] = (), last: int = 120) -> str:
        """The lines that concern these requests or pages, and all that happened to processes and rules."""
        wanted, held = {root_of(self.request_of.get(name, name)) for name in names}, set(pages)
        lines = []
        for event in self.events:
            roots = {root_of(self.request_of.get(name, name)) for name in event.names}
            always = not event.names and not event.pages and isinstance(event.what, str)
            if always or not (wanted or held) or roots & wanted or event.pages & held:
                lines.append(str(event))
        left_out = [f"   ... {len(lines) - last} lines before"] if len(lines) > last else []
        return "\n".join([*left_out, *_joined(lines[-last:])])


def _joined(lines: list[str]) -> list[str]:
    """Equal lines after one another, but for their times, as one."""
    found: list[tuple[str, int]] = []
    for line in lines:
        if found and found[-1][0][10:] == line[10:]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((line, 1))
    return [line + (f"   ({n} times)" if n > 1 else "") for line, n in found]


def is_quiet(message: object) -> bool:
    """Signs of life that nothing went wrong with are no news."""
    return isinstance(message, _QUIET)


def names_of(message: object) -> frozenset[str]:
    """Requests and transfers that a message is about."""
    if isinstance(message, Tokens):
        return frozenset(delta.request for delta in message.deltas)
    if isinstance(message, Renew):
        return frozenset(message.transfers)
    names = (getattr(message, "request", None), getattr(message, "transfer", None))
    return frozenset(name for name in names if name is not None)


def pages_of(source: PeerId, message: object) -> frozenset[PageOf]:
    """Pages that a message speaks of: those of its sender."""
    if isinstance(message, Grant):
        return frozenset((source, page) for row in message.pages for page in row)
    rows = getattr(message, "pages", ())
    return frozenset((source, page) for row in rows for page in row) if isinstance(rows, tuple) else frozenset()


def short(message: object) -> str:
    """A message in few words: its name, and those fields that tell it from others."""
    name = type(message).__name__
    match message:
        case Generate():
            emitted = f" + {len(message.emitted)} emitted" if message.emitted else ""
            return f"{name} {message.request}: {len(message.prompt)} tokens{emitted}, at most {message.sampling.max_tokens}"
        case GrantRequest():
            return f"{name} {short_transfer(message.transfer)} for {message.request} ({message.transport})"
        case Grant():
            rows = " ".join(",".join(map(str, row)) for row in message.pages)
            return f"{name} {short_transfer(message.transfer)} pages {rows} lease {message.lease_ms} ms"[:_SHORT]
        case KvSent():
            spans = " ".join(f"L{s.layer}+{s.n_layers} b{s.first_block}+{s.n_blocks}" for s in message.spans)
            return f"{name} {short_transfer(message.transfer)} {spans}"
        case HandOver():
            return f"{name} {short_transfer(message.transfer)} first token {message.first_token}"
        case Tokens():
            deltas = (f"{d.request}[{d.position}]{' ' + d.finish if d.finish else ''}" for d in message.deltas)
            return f"{name} {' '.join(deltas)}"[:_SHORT]
    if not isinstance(message, msgspec.Struct):
        return f"{name}"
    return f"{name} {_fields(message)}"[:_SHORT]


def short_transfer(transfer: str) -> str:
    """`prefill-0@3/7`."""
    peer, slash, number = transfer.partition("/")
    return short_peer(peer) + slash + number


def _fields(message: msgspec.Struct) -> str:
    words = []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Sampling | Member | dict):
            continue
        if name == "transfer":
            value = short_transfer(value) if value else ""
        if isinstance(value, tuple):
            value = f"{len(value)}x"
        words.append(f"{name}={value}" if name not in ("request", "transfer") else f"{value}")
    return " ".join(word for word in words if word)
