"""The tensors of a checkpoint: one safetensors file, or several with an index. Read one at a time, never as a whole."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies, from the header of its file."""

    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, F16, ..."""
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted by name. Raises ConfigError if there is none or one is missing."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not index.is_file():
        raise ConfigError(f"{folder}: has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints can be loaded")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: is not a safetensors index ({type(error).__name__}: {error})") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: the index names files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ConfigError if the file is not one or is cut short."""
    with file.open("rb") as stream:
        length_bytes = stream.read(8)
        header_bytes = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
        header = stream.read(header_bytes) if 2 <= header_bytes <= _MAX_HEADER_BYTES else b""
    if len(header) < 2 or len(header) != header_bytes:
        raise ConfigError(f"{file}: is not a safetensors file, or is cut short")
    return header


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the checkpoint by its name. Raises ConfigError, naming the file, for a broken one."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        header = read_header(file)
        try:
            entries = dict(_entries(file, header))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: unreadable safetensors header ({type(error).__name__}: {error})") from error
        found.update(entries)
    return found


def _entries(file: Path, header: bytes) -> Iterator[tuple[str, StoredTensor]]:
    tensors = json.loads(header)
    ends = [0]
    for name, entry in tensors.items():
        if name == "__metadata__":
            continue
        ends.append(int(entry["data_offsets"][1]))
        yield name, StoredTensor(file, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
    expected_bytes, found_bytes = 8 + len(header) + max(ends), file.stat().st_size
    if found_bytes < expected_bytes:
        raise ConfigError(f"{file}: is cut short, {found_bytes} bytes of {expected_bytes}")
