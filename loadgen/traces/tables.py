"""The CSV traces: Azure's and BurstGPT's. Both have times and lengths, and nothing about what prompts share.

A row that cannot be read is an error with file and line. Rows without prompt or answer are in the real files, are
failures there, and are left out and counted.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from common.errors import ConfigError
from loadgen.traces.trace import Session, Trace, TraceRequest, from_start

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
_UNSHARED = "the file does not say what prompts share: every prompt is its own"


def read_azure(lines: Iterable[str], name: str) -> Trace:
    """Azure's LLM inference traces of 2023 and 2024: wall-clock times, to 100 ns. Raises ConfigError."""
    sessions, left_out = _rows(lines, name, AZURE_COLUMNS, _wall_clock_s)
    return Trace(format="azure", sessions=sessions, left_out=left_out, notes=(_UNSHARED,))


def read_burstgpt(lines: Iterable[str], name: str) -> Trace:
    """BurstGPT's traces, with six columns or with eight (session and elapsed time): times in s. Raises ConfigError."""
    sessions, left_out = _rows(lines, name, BURSTGPT_COLUMNS, _seconds)
    return Trace(format="burstgpt", sessions=sessions, left_out=left_out, notes=(_UNSHARED,))


def _rows(
    lines: Iterable[str], name: str, columns: tuple[str, str, str], seconds: Callable[[str], float]
) -> tuple[tuple[Session, ...], Mapping[str, int]]:
    rows = csv.DictReader(lines, skipinitialspace=True)
    header = [column.strip().removeprefix("\ufeff") for column in rows.fieldnames or []]
    rows.fieldnames = header
    if missing := [column for column in columns if column not in header]:
        raise ConfigError(f"{name}:1: no column {', '.join(missing)}; the header is {','.join(header)!r}")
    time, prompt, answer = columns
    sessions: list[Session] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        place = f"{name}:{rows.line_num}"
        added_tokens, output_tokens = _count(row[prompt], place, prompt), _count(row[answer], place, answer)
        if added_tokens == 0:
            left_out["without prompt"] += 1
        elif output_tokens == 0:
            left_out["without answer (failed requests)"] += 1
        else:
            at_s = _time(row[time], place, time, seconds)
            request = TraceRequest(at_s=at_s, added_tokens=added_tokens, output_tokens=output_tokens)
            sessions.append(Session(requests=(request,)))
    return from_start(sessions), left_out


def _count(text: str | None, place: str, column: str) -> int:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not value >= 0 or value != int(value):
        raise ConfigError(f"{place}: {column} must be a whole number, 0 or more, not {text!r}")
    return int(value)


def _time(text: str | None, place: str, column: str, seconds: Callable[[str], float]) -> float:
    try:
        value = seconds(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{place}: {column} is no time: {text!r}")
    return value


def _seconds(text: str) -> float:
    return float(text)


def _wall_clock_s(text: str) -> float:
    parsed = datetime.fromisoformat(text)  # a seventh decimal is dropped: it is below what replaying can keep
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
