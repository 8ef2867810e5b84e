"""The JSON files of a model folder, read by whoever serves it: small, plain, and with sizes that can be true.

Model folders come from others. What is wrong is said before a library computes with it: a config of 2^31 layers makes some
of them build a list of as many.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any  # Any: parsed JSON

from common.errors import ConfigError
from common.units import format_bytes

_MOST_BYTES = 64 * 2**20
_LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
}
_POSITIVE = ("rms_norm_eps", "rope_theta", "initializer_range", "query_pre_attn_scalar")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError that names the file and what is wrong, also for one that is not there."""
    try:
        found = json.loads(_read(path))
    except (OSError, ValueError) as error:  # no JSON, no UTF-8, a name that no file can have
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read (nested too deep)") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: cannot be read (it must hold a JSON object)")
    return found


def _read(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe in its place must not stop the start
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("is no plain file")
        if state.st_size > _MOST_BYTES:
            raise ValueError(f"has {format_bytes(state.st_size)}, and at most {format_bytes(_MOST_BYTES)} are read")
        return file.read(state.st_size).decode("utf-8")


def decoder_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models with a vision part keep the decoder's shape in an object of its own; others are all decoder."""
    part = config.get("text_config")
    return {**config, **part} if isinstance(part, Mapping) else config


def require_possible(config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for sizes that no model has. What is not given is not missed here; null counts as that."""
    part = decoder_part(config)
    for name, most in _LIMITS.items():
        value = part.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ConfigError(f"{path}: {name} is {_shown(value)}; it must be a whole number from 1 to {most}")
    for name in _POSITIVE:
        value = part.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ConfigError(f"{path}: {name} is {_shown(value)}; it must be a number above 0")
    types = part.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(one, str) for one in types)):
        raise ConfigError(f"{path}: layer_types is {_shown(types)}; it must be a list of names, one for each layer")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
