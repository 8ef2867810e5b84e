"""Traces as lines of JSON: our own form, which keeps everything, and Mooncake's, which keeps lengths, times and sharing."""

from collections.abc import Iterator

import msgspec

from common.errors import ConfigError
from loadgen.traces.blocks import prompts
from loadgen.traces.own import OwnLine
from loadgen.traces.trace import Session, Trace


def own_lines(trace: Trace) -> Iterator[bytes]:
    """One line for each request; `read_own` makes the same trace of them."""
    encode = msgspec.json.Encoder().encode
    taken: set[str] = set()
    for place, session in enumerate(trace.sessions):
        name = _unique(session, place, taken)
        for turn, request in enumerate(session.requests):
            line = OwnLine(
                t=None if request.at_s is None else round(request.at_s, 6),
                session=name,
                turn=turn if len(session.requests) > 1 else None,
                opening=(session.opening or None) if turn == 0 else None,
                prompt=request.content,
                isl=request.added_tokens,
                osl=request.output_tokens,
                hash_ids=request.hash_ids or None,
                block=trace.block_tokens if request.hash_ids else None,
                think_s=round(request.think_s, 6),
                cancel_after_tokens=request.cancel_after_tokens,
            )
            yield encode(line)


def _unique(session: Session, place: int, taken: set[str]) -> str | None:
    """A name that no other conversation has: lines of one name are read as one conversation."""
    if len(session.requests) == 1 and not session.name:
        return None
    name = session.name or f"s{place}"
    while name in taken:
        name = f"{name}-{place}"
    taken.add(name)
    return name


def mooncake_lines(trace: Trace, block_tokens: int) -> Iterator[bytes]:
    """One line for each request, in the order of times. Raises ConfigError for a trace without times.

    A later turn of a session has the time of the request before it and its pause: what answers took is not in a trace.
    Its prompt has the history, answers at their recorded lengths.
    """
    if not trace.has_times:
        raise ConfigError(
            "a Mooncake trace needs times, and this one has none; `trace make --rate` writes traces with times"
        )
    rows: list[tuple[float, int, bytes]] = []
    at_s = 0.0
    for place, prompt in enumerate(prompts(trace, block_tokens)):
        request = prompt.request
        at_s = request.at_s if request.at_s is not None else at_s + request.think_s
        line = {
            "timestamp": round(at_s * 1e3),
            "input_length": prompt.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": prompt.blocks,
        }
        rows.append((at_s, place, msgspec.json.encode(line)))
    for _, _, encoded in sorted(rows):
        yield encoded
