"""Names of the blocks of every prompt of a trace, so that equal names mean equal prompts up to there. Pure.

Nothing is drawn: made-up content is known by where it comes from. Blocks that the trace names keep their names, and all
others get numbers above them, in the order of their first appearance.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from loadgen.traces.measure import Unit
from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.plan import Content


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's whole prompt: opening, what was added, and the answers between."""

    session: int
    """Place of its session in the trace."""
    turn: int
    request: TraceRequest
    input_tokens: int
    blocks: tuple[int, ...]
    """The last may be partial."""


def prompts(trace: Trace, block_tokens: int) -> Iterator[Prompt]:
    """Every request in the order of sessions, with its blocks of `block_tokens`."""
    ids = (hash_id for session in trace.sessions for request in session.requests for hash_id in request.hash_ids)
    numbers = _Numbers(max(ids, default=-1) + 1)
    for place in range(len(trace.sessions)):
        yield from _session_prompts(trace, place, block_tokens, numbers)


@dataclass(frozen=True, slots=True)
class _MadeUp:
    """Tokens from `start` to `stop` of an origin that has no content yet."""

    origin: str
    start: int
    stop: int
    hash_id: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "_MadeUp":
        return _MadeUp(self.origin, self.start + start, self.start + stop, self.hash_id)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Tokens that are known."""

    units: tuple[Unit, ...]

    def __len__(self) -> int:
        return len(self.units)

    def part(self, start: int, stop: int) -> "_Recorded":
        return _Recorded(self.units[start:stop])


_Piece = _MadeUp | _Recorded


@dataclass(slots=True)
class _Numbers:
    """Numbers of blocks, by what is in them and before them."""

    next_number: int
    known: dict[bytes, int] = field(default_factory=dict)

    def of(self, before: int, pieces: list[_Piece], name: int | None) -> int:
        """The block's number; `name`: what the trace calls it, if it does."""
        key = blake2b(repr((before, pieces)).encode(), digest_size=16).digest()
        if key not in self.known:
            self.known[key] = self.next_number if name is None else name
            self.next_number += name is None
        return self.known[key]


def _session_prompts(trace: Trace, place: int, block_tokens: int, numbers: _Numbers) -> Iterator[Prompt]:
    session: Session = trace.sessions[place]
    # An id names what is before its block too, so it stays a name only where nothing else comes before.
    names_hold = trace.block_tokens == block_tokens and not session.opening
    history = _recorded(session.opening, trace)
    for turn, request in enumerate(session.requests):
        history += _added(request, trace, f"{place}/{turn}")
        blocks: list[int] = []
        for pieces in _cut(history, block_tokens):
            name = _name(pieces) if names_hold and turn == 0 else None
            blocks.append(numbers.of(blocks[-1] if blocks else -1, pieces, name))
        yield Prompt(place, turn, request, sum(map(len, history)), tuple(blocks))
        history.append(_MadeUp(f"answer {place}/{turn}", 0, request.output_tokens))


def _name(pieces: list[_Piece]) -> int | None:
    only = pieces[0]
    return only.hash_id if len(pieces) == 1 and isinstance(only, _MadeUp) else None


def _added(request: TraceRequest, trace: Trace, name: str) -> list[_Piece]:
    if request.content is not None:
        return _recorded(request.content, trace)
    pieces: list[_Piece] = []
    missing_tokens = request.added_tokens
    for hash_id in request.hash_ids:
        if missing_tokens > 0:
            pieces.append(_MadeUp(f"block {hash_id}", 0, min(trace.block_tokens, missing_tokens), hash_id))
            missing_tokens -= trace.block_tokens
    if missing_tokens > 0:
        pieces.append(_MadeUp(f"request {name}", 0, missing_tokens))
    return pieces


def _recorded(content: Content, trace: Trace) -> list[_Piece]:
    if not content:
        return []
    return [_Recorded(trace.measure.split(content) if isinstance(content, str) else content)]


def _cut(pieces: list[_Piece], block_tokens: int) -> Iterator[list[_Piece]]:
    block: list[_Piece] = []
    room_tokens = block_tokens
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = min(len(piece), start + room_tokens)
            block.append(piece.part(start, stop))
            room_tokens -= stop - start
            start = stop
            if room_tokens == 0:
                yield block
                block, room_tokens = [], block_tokens
    if block:
        yield block
