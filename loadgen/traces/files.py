"""Trace files: which format one has, told by what is in it, and its trace."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import msgspec

from common.errors import ConfigError
from loadgen.traces.answers import Answers
from loadgen.traces.measure import BY_CHARACTERS, with_tokenizer
from loadgen.traces.mooncake import read_mooncake
from loadgen.traces.own import read_own
from loadgen.traces.sharegpt import read_sharegpt
from loadgen.traces.tables import AZURE_COLUMNS, BURSTGPT_COLUMNS, read_azure, read_burstgpt
from loadgen.traces.trace import MOONCAKE_BLOCK_TOKENS, Trace
from loadgen.workload.lengths import LengthLaw

FORMATS = ("custom", "mooncake", "azure", "burstgpt", "sharegpt")
"""`custom` is our own."""
TEXT_FORMATS = ("custom", "sharegpt")
"""Those that may have texts, and prompts whose answers have no length yet."""
_LOOKED_AT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A file and how to read it."""

    path: str
    format: str | None = None
    """None: told by its content."""
    block_tokens: int | None = None
    """Tokens per hash id of a Mooncake trace; None: 512."""
    tokenizer: str | None = None
    """Counts recorded texts; None: four characters a token."""
    output_lengths: LengthLaw | None = None
    """Of answers whose length the file does not say; None: that is an error, or such questions are left out."""


def read_trace(file: TraceFile, seed: int | str = 0) -> Trace:
    """The trace in a file; `seed` is of what is drawn. Raises ConfigError that names the file, and the line if there is one."""
    with _opened(file.path) as lines:
        beginning = lines.read(_LOOKED_AT)
        name = file.format or recognised(beginning, file.path)
        lines.seek(0)
        try:
            trace = _read(lines, name, file, seed)
        except ConfigError as error:
            if name == file.format and (looks := _looks_unlike(name, beginning)):
                raise ConfigError(f"{error}; {looks}") from error
            raise
    if not trace.sessions:
        left_out = ", ".join(f"{count} {reason}" for reason, count in trace.left_out.items())
        raise ConfigError(f"{file.path}: has no request that can be sent{': ' + left_out if left_out else ''}")
    return trace


def format_of(path: str) -> str:
    """The format of a file, told by its content. Raises ConfigError."""
    with _opened(path) as lines:
        return recognised(lines.read(_LOOKED_AT), path)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8: {error}") from error


def _looks_unlike(name: str, beginning: str) -> str:
    """What a file that cannot be read as `name` looks like; empty: like `name`."""
    try:
        looks = recognised(beginning, name)
    except ConfigError:
        return f"the file looks like none of {', '.join(FORMATS)}: it begins with {_first_line(beginning)[:60]!r}"
    return "" if looks == name else f"the file looks like {looks}, not {name}"


def _read(lines: Iterable[str], name: str, file: TraceFile, seed: int | str) -> Trace:
    if file.block_tokens is not None and name != "mooncake":
        raise ConfigError(f"--block is for Mooncake traces; {file.path} is read as {name}")
    if file.tokenizer is not None and name not in TEXT_FORMATS:
        raise ConfigError(f"--tokenizer counts recorded texts; {file.path} is read as {name} and has none")
    if file.output_lengths is not None and name not in TEXT_FORMATS:
        raise ConfigError(
            f"--osl is for {' and '.join(TEXT_FORMATS)}; {file.path} is read as {name} and says it itself"
        )
    if name == "mooncake":
        return read_mooncake(lines, file.path, file.block_tokens or MOONCAKE_BLOCK_TOKENS)
    if name == "azure":
        return read_azure(lines, file.path)
    if name == "burstgpt":
        return read_burstgpt(lines, file.path)
    measure = BY_CHARACTERS if file.tokenizer is None else with_tokenizer(file.tokenizer)
    answers = None if file.output_lengths is None else Answers(lengths=file.output_lengths, seed=seed)
    return (read_sharegpt if name == "sharegpt" else read_own)(lines, file.path, measure, answers)


def recognised(beginning: str, name: str) -> str:
    """The format of a file that begins so. Raises ConfigError that says what is read."""
    first = _first_line(beginning)
    columns = [column.strip() for column in first.split(",")]
    if all(column in columns for column in AZURE_COLUMNS):
        return "azure"
    if all(column in columns for column in BURSTGPT_COLUMNS):
        return "burstgpt"
    if first.startswith("[") and first[1:].lstrip()[:1] in ("", "{", "]"):
        return "sharegpt"
    if first.startswith("{"):
        return _of_object(first)
    raise ConfigError(f"{name}: none of {', '.join(FORMATS)}; it begins with {first[:60]!r}")


def _first_line(beginning: str) -> str:
    return next((line.strip() for line in beginning.splitlines() if line.strip()), "")


def _of_object(line: str) -> str:
    try:
        keys = set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except msgspec.MsgspecError:  # longer than what was looked at, or broken, which its reader will say
        keys = {key for key in ("conversations", "input_length", "hash_ids") if f'"{key}"' in line}
    if "conversations" in keys:
        return "sharegpt"
    return "mooncake" if "input_length" in keys else "custom"
