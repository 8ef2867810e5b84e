"""The tensors of a checkpoint: one safetensors file, or several with an index. Read one at a time, never as a whole."""

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: parsed JSON

from common.errors import ConfigError
from common.model_config import read_json_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w][\w.+-]*\.safetensors", re.ASCII)  # no path: it could lead anywhere on the machine
_MAX_HEADER_BYTES = 100 * 2**20
_MOST_DIMENSIONS, _MOST_VALUES = 8, 2**48
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
}


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
        names = sorted(set(read_json_object(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: is not a safetensors index ({type(error).__name__}: {error})") from error
    for name in names:
        if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
            raise ConfigError(
                f"{index}: names the file {str(name)[:60]!r}; it must be one of its own folder that ends in .safetensors"
            )
    if not names:
        raise ConfigError(f"{index}: names no file")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: the index names files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file. Raises ConfigError if the file is not one or is cut short."""
    with file.open("rb") as stream:
        length_bytes = stream.read(8)
        header_bytes = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
        most_bytes = min(_MAX_HEADER_BYTES, os.fstat(stream.fileno()).st_size)  # room is taken before the file is read
        header = stream.read(header_bytes) if 2 <= header_bytes <= most_bytes else b""
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)[:200]
            raise ConfigError(f"{file}: unreadable safetensors header ({type(error).__name__}: {reason})") from error
        if twice := found.keys() & entries.keys():
            raise ConfigError(f"{file}: {len(twice)} tensors lie in another file too, one is {min(twice)[:60]}")
        found.update(entries)
    return found


def _entries(file: Path, header: bytes) -> Iterator[tuple[str, StoredTensor]]:
    """Raises ConfigError, ValueError, KeyError, TypeError or AttributeError for what no safetensors file says."""
    tensors = json.loads(header, object_pairs_hook=_without_repeats)
    tensors.pop("__metadata__", None)
    places: list[tuple[int, int]] = []
    for name, entry in tensors.items():
        stored = StoredTensor(file, entry["dtype"], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        _require_size(name[:60], stored, begin, end)
        places.append((begin, end))
        yield name, stored
    expected_bytes, found_bytes = 8 + len(header) + max((end for _, end in places), default=0), file.stat().st_size
    if found_bytes < expected_bytes:
        raise ConfigError(f"{file}: is cut short, {found_bytes} bytes of {expected_bytes}")
    places.sort()
    for (_, before), (begin, _) in itertools.pairwise(places):
        if begin < before:
            raise ValueError(f"two tensors overlap at byte {begin}")


def _require_size(name: str, stored: StoredTensor, begin: object, end: object) -> None:
    bits = _BITS.get(stored.dtype) if isinstance(stored.dtype, str) else None
    if bits is None:
        raise ValueError(f"{name} has the dtype {str(stored.dtype)[:60]!r}")
    if len(stored.shape) > _MOST_DIMENSIONS or any(
        type(size) is not int or not 0 <= size <= _MOST_VALUES for size in stored.shape
    ):
        raise ValueError(f"{name} has the shape {str(stored.shape)[:60]}")
    n_bytes = math.prod(stored.shape) * bits // 8
    if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != n_bytes:
        raise ValueError(f"{name} has {n_bytes} bytes by its shape, and lies at {str((begin, end))[:60]}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found
