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
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    tokens = record.chunk_tokens
    if tokens is not None and len(tokens) != len(record.chunk_s):
        raise ValueError(f"{len(record.chunk_s)} chunks, but {len(tokens)} counts of tokens")
    chunk_tokens = None if tokens is None else array("l", tokens)
    return replace(record, chunk_s=array("d", record.chunk_s), chunk_tokens=chunk_tokens)


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
