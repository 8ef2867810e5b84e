"""One request as a line of `requests.jsonl` or of `requests.csv`. Pure.

A line holds every field of RequestRecord under its own name, times in seconds of the run's clock, and what people
compute from them first: `send_lag_s`, `ttft_s`, `ttst_s`, `tpot_s`, `e2e_s` (written, not read back).
"""

import csv
import io
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any  # Any: JSON

import msgspec

from loadgen.results.records import RequestRecord

_FIELDS = tuple(field.name for field in fields(RequestRecord))
_COMPUTED = ("send_lag_s", "ttft_s", "ttst_s", "tpot_s", "e2e_s")
_LISTS = ("chunk_s", "chunk_tokens")
_MAPPINGS = ("workers", "phases_ms")
_TIMES = ("held_s", "planned_s", "sent_s", "end_s")
_COUNTS = ("asked_input_tokens", "asked_output_tokens", "input_tokens", "output_tokens", "cached_tokens")
_PLACES = ("index", "conversation", "turn")
MOST_S = 1e7
"""Of any time in a result, in either direction: some four months."""
_MOST_TOKENS = 2**31
_MOST_CHUNK_TOKENS = 2**20
"""No event holds more token ids than that."""
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(RequestRecord).decode


def to_line(record: RequestRecord) -> bytes:
    """One line of JSON, without its line end."""
    found: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS}
    found |= {name: getattr(record, name) for name in _COMPUTED}
    for name in _LISTS:
        found[name] = None if found[name] is None else list(found[name])
    for name in _MAPPINGS:
        found[name] = dict(found[name])
    return _encode(found)


def from_line(line: bytes) -> RequestRecord:
    """The record again; chunks as arrays, as the client has them. Raises ValueError if the line is damaged."""
    try:
        record = _decode(line)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    _check(record)
    tokens = record.chunk_tokens
    if tokens is not None and len(tokens) != len(record.chunk_s):
        raise ValueError(f"{len(record.chunk_s)} chunks, but {len(tokens)} counts of tokens")
    chunk_tokens = None if tokens is None else array("l", tokens)
    return replace(record, chunk_s=array("d", record.chunk_s), chunk_tokens=chunk_tokens)


def _check(record: RequestRecord) -> None:
    """Numbers that no run writes would take reports memory and time without end. Raises ValueError."""
    times_s = [*(getattr(record, name) for name in _TIMES), *record.chunk_s]
    times_s += [phase_ms / 1e3 for phase_ms in record.phases_ms.values()]
    if not all(abs(at_s) <= MOST_S for at_s in times_s):
        raise ValueError(f"a time beyond {MOST_S:g}")
    counts = [getattr(record, name) or 0 for name in (*_COUNTS, *_PLACES)]
    if not all(0 <= count <= _MOST_TOKENS for count in counts):
        raise ValueError(f"a number of tokens, or a place, that is not from 0 to {_MOST_TOKENS}")
    if not all(0 <= count <= _MOST_CHUNK_TOKENS for count in record.chunk_tokens or ()):
        raise ValueError(f"tokens of a chunk that are not from 0 to {_MOST_CHUNK_TOKENS}")


def to_csv(records: Sequence[RequestRecord]) -> str:
    """A table for spreadsheets: a line per request in order; chunks only as their number, a column per phase.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    ordered = sorted(records, key=lambda record: record.index)
    plain = [name for name in _FIELDS if name not in _LISTS + _MAPPINGS]
    workers, phases = _keys(record.workers for record in ordered), _keys(record.phases_ms for record in ordered)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [*plain, *_COMPUTED, "chunks", *(f"{name}_worker" for name in workers)]
    writer.writerow([*columns, *(f"{name}_ms" for name in phases)])
    for record in ordered:
        cells = [getattr(record, name) for name in (*plain, *_COMPUTED)]
        cells.append(len(record.chunk_s))
        cells += [record.workers.get(name) for name in workers]
        cells += [record.phases_ms.get(name) for name in phases]
        writer.writerow([_cell(cell) for cell in cells])
    return out.getvalue()


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
