"""Trace files: which format one has, told by what is in it, and its trace."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.errors import ConfigError
from loadgen.traces.measure import BY_CHARACTERS, with_tokenizer
from loadgen.traces.mooncake import read_mooncake
from loadgen.traces.own import read_own
from loadgen.traces.sharegpt import read_sharegpt
from loadgen.traces.tables import AZURE_COLUMNS, BURSTGPT_COLUMNS, read_azure, read_burstgpt
from loadgen.traces.trace import MOONCAKE_BLOCK_TOKENS, Trace

FORMATS = ("penstock", "mooncake", "azure", "burstgpt", "sharegpt")
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


def read_trace(file: TraceFile) -> Trace:
    """The trace in a file. Raises ConfigError that names the file, and the line where there is one."""
    try:
        with Path(file.path).open(encoding="utf-8-sig", newline="") as lines:
            name = file.format or recognised(lines.read(_LOOKED_AT), file.path)
            lines.seek(0)
            trace = _read(lines, name, file)
    except OSError as error:
        raise ConfigError(f"{file.path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.path}: is no text in UTF-8: {error}") from error
    if not trace.sessions:
        left_out = ", ".join(f"{count} {reason}" for reason, count in trace.left_out.items())
        raise ConfigError(f"{file.path}: has no request that can be sent{': ' + left_out if left_out else ''}")
    return trace


def _read(lines: Iterable[str], name: str, file: TraceFile) -> Trace:
    if file.block_tokens is not None and name != "mooncake":
        raise ConfigError(f"--block is for Mooncake traces; {file.path} is read as {name}")
    if file.tokenizer is not None and name not in ("penstock", "sharegpt"):
        raise ConfigError(f"--tokenizer counts recorded texts; {file.path} is read as {name} and has none")
    if name == "mooncake":
        return read_mooncake(lines, file.path, file.block_tokens or MOONCAKE_BLOCK_TOKENS)
    if name == "azure":
        return read_azure(lines, file.path)
    if name == "burstgpt":
        return read_burstgpt(lines, file.path)
    measure = BY_CHARACTERS if file.tokenizer is None else with_tokenizer(file.tokenizer)
    return (read_sharegpt if name == "sharegpt" else read_own)(lines, file.path, measure)


def recognised(beginning: str, name: str) -> str:
    """The format of a file that begins so. Raises ConfigError that says what is read."""
    first = next((line.strip() for line in beginning.splitlines() if line.strip()), "")
    columns = [column.strip() for column in first.split(",")]
    if all(column in columns for column in AZURE_COLUMNS):
        return "azure"
    if all(column in columns for column in BURSTGPT_COLUMNS):
        return "burstgpt"
    if first.startswith("["):
        return "sharegpt"
    if first.startswith("{"):
        return _of_object(first)
    raise ConfigError(f"{name}: none of {', '.join(FORMATS)}; it begins with {first[:60]!r}. Name it with --format")


def _of_object(line: str) -> str:
    try:
        keys = set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except msgspec.MsgspecError:  # longer than what was looked at, or broken, which its reader will say
        keys = {key for key in ("conversations", "input_length", "hash_ids") if f'"{key}"' in line}
    if "conversations" in keys:
        return "sharegpt"
    return "mooncake" if "input_length" in keys else "penstock"
