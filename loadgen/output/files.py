"""A result as a folder: `result.json`, `requests.jsonl`, `timeline.jsonl`. Written, and read back equal.

    result.json      the numbers, vLLM's keys first; under `run` what is needed to read the result back
    requests.jsonl   one line per request: all that is known of it
    timeline.jsonl   one line per sample of the server; empty if it told nothing

`result.json` comes last, is renamed into place, and says how many lines the others have: a folder whose writing was
interrupted has none, and is refused. JSON has no infinity; it is written as "inf".
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar  # Any: JSON

import msgspec

from common.errors import ConfigError
from loadgen.output.result_json import SCHEMA_VERSION, to_json
from loadgen.results.health import GeneratorHealth
from loadgen.results.metrics import Summary
from loadgen.results.nesting import is_deeper
from loadgen.results.records import RequestRecord
from loadgen.results.request_lines import MOST_S, from_line, to_line
from loadgen.results.result import Result, RunFacts
from loadgen.results.timeline import ServerSample, ServerView, WorkerSample
from loadgen.stats.resampling import Interval
from loadgen.stats.saturation import Saturation

RESULT, REQUESTS, TIMELINE = "result.json", "requests.jsonl", "timeline.jsonl"
_decode_sample = msgspec.json.Decoder(ServerSample).decode
_WANTED = "give a folder that `penstock bench run --out` wrote"
_T = TypeVar("_T")
_FREE_TOKENS, _TOKENS_PER_CHUNK = 2 * 10**7, 100
"""A folder may speak of so many tokens, and of so many more for each chunk it holds: reports look at every token."""
_DEEPEST = 100
_MOST_COUNT = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    facts: dict[str, Any]
    summary: Summary
    health: GeneratorHealth
    saturation: Saturation | None
    intervals: dict[str, Interval]
    server: ServerView
    lines: dict[str, int]
    """Of the other files."""


def save(result: Result, folder: Path) -> None:
    """Write the result, over one that is already there; makes the folder. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)  # what follows is no longer its requests
    records = sorted(result.records, key=lambda record: record.index)
    _write(folder / REQUESTS, (to_line(record) + b"\n" for record in records))
    _write(folder / TIMELINE, (msgspec.json.encode(sample) + b"\n" for sample in result.server.samples))
    parts = _Parts(
        facts=msgspec.to_builtins(result.facts),
        summary=result.summary,
        health=result.health,
        saturation=result.saturation,
        intervals=dict(result.intervals),
        server=replace(result.server, samples=()),
        lines={REQUESTS: len(records), TIMELINE: len(result.server.samples)},
    )
    whole = _finite(msgspec.to_builtins(to_json(result) | {"run": parts}))
    _write(folder / RESULT, [msgspec.json.format(msgspec.json.encode(whole)), b"\n"])


def load(folder: Path) -> Result:
    """Read a result back; its records are in order of their index. Raises ConfigError: no whole result of ours there."""
    path = folder / RESULT
    raw = _raw(path)
    if is_deeper(raw.get("run"), _DEEPEST):
        raise ConfigError(f"{path}: damaged: nested deeper than {_DEEPEST} levels")
    try:
        parts = msgspec.convert(raw.get("run"), _Parts, str_keys=True)  # percentiles are numbers
        facts = msgspec.convert(_with_rates(parts.facts), RunFacts)
    except (msgspec.MsgspecError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged: run: {error}") from error
    records = _lines(folder / REQUESTS, from_line, parts.lines.get(REQUESTS))
    _check_total(folder / REQUESTS, records)
    samples = _lines(folder / TIMELINE, _sample, parts.lines.get(TIMELINE))
    server = replace(parts.server, samples=tuple(samples))
    return Result(facts, parts.summary, parts.health, tuple(records), server, parts.saturation, parts.intervals)


def is_result(folder: Path) -> bool:
    """True if a whole result seems to be there."""
    return (folder / RESULT).is_file()


def _raw(path: Path) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        if (path.parent / REQUESTS).exists():
            raise ConfigError(f"{path.parent}: no {RESULT}: writing it was interrupted; measure again") from error
        raise ConfigError(f"{path.parent}: no {RESULT} there; {_WANTED}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {_WANTED}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from error
    version = raw.get("schema_version")
    if not isinstance(version, int):
        raise ConfigError(f"{path}: not written by penstock bench: no schema_version; {_WANTED}")
    if version != SCHEMA_VERSION:
        age, remedy = ("newer", "update penstock") if version > SCHEMA_VERSION else ("older", "measure again")
        raise ConfigError(f"{path}: schema_version {version} is {age} than {SCHEMA_VERSION}, all this reads; {remedy}")
    return raw


def _lines(path: Path, decode: Callable[[bytes], _T], expected: int | None) -> list[_T]:
    found = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found.append(decode(line))
                except (ValueError, msgspec.MsgspecError, RecursionError) as error:
                    raise ConfigError(f"{path}:{number}: damaged: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the folder is not whole") from error
    if len(found) != expected:
        raise ConfigError(f"{path}: {len(found)} lines, but {RESULT} speaks of {expected}; the folder is not whole")
    return found


def _sample(line: bytes) -> ServerSample:
    """Raises ValueError or MsgspecError."""
    sample = _decode_sample(line)
    every: tuple[ServerSample | WorkerSample, ...] = (sample, *sample.workers.values())
    if abs(sample.at_s) > MOST_S or any(abs(one.waiting) + abs(one.running) > _MOST_COUNT for one in every):
        raise ValueError("a time or a number of requests beyond all sense")
    parts = (owners for tiers in sample.memory.values() for owners in tiers.values())
    if any(not 0 <= n_bytes <= _MOST_COUNT for owners in parts for n_bytes in owners.values()):
        raise ValueError("a size of memory beyond all sense")
    return sample


def _check_total(path: Path, records: Sequence[RequestRecord]) -> None:
    told = [record.chunk_tokens for record in records if record.chunk_tokens is not None]
    tokens, allowed = sum(map(sum, told)), _FREE_TOKENS + _TOKENS_PER_CHUNK * sum(map(len, told))
    if tokens > allowed:
        raise ConfigError(f"{path}: damaged: speaks of {tokens} tokens in chunks that hold at most {allowed}")


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """All or nothing: under another name first, on the disk before the name is changed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _with_rates(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Undo `_finite` where rates are: in the facts and, by the names of flags, in the settings."""
    settings = {name: _infinite(value) for name, value in facts["settings"].items()}
    return {**facts, "request_rate": _infinite(facts["request_rate"]), "settings": settings}


def _infinite(value: object) -> object:
    return math.inf if value == "inf" else value
