"""What a model folder is, read from its config and the headers of its files; no weights are loaded."""

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.messages.liveness import ModelIdentity
from common.model_config import read_json_object, require_possible
from kvstore.memory.plan import HOST_LEAST_PAGE_BYTES, virtual_block_tokens
from services.worker.model.checkpoint import StoredTensor, read_header, stored_tensors, weight_files
from services.worker.model.families import require_exact, require_known
from services.worker.model.source import resolve_model

DTYPES = ("float32", "bfloat16")
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_PAGED_BLOCK_TOKENS = 16
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedModel:
    """A model that can be served, not loaded yet."""

    folder: Path
    config: PreTrainedConfig
    identity: ModelIdentity
    layout: KvLayout


def inspect_model(
    path_or_hub_id: str | Path,
    dtype: str = "auto",
    *,
    name: str | None = None,
    block_tokens: int | None = None,
    kv_layout: str = "paged",
) -> InspectedModel:
    """Identity and KV layout of a model, in milliseconds. `name` None takes the last part of the path or hub id.

    `dtype` is auto (the checkpoint's own), float32 or bfloat16. `block_tokens` None: what suits `kv_layout` on the host.
    Raises ConfigError for what cannot be served.
    """
    folder = resolve_model(str(path_or_hub_id))
    config = _read_config(folder)
    architecture = require_exact(config)
    stored = stored_tensors(folder)
    chosen = _choose_dtype(dtype, config, stored)
    kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layout = KvLayout(
        layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=chosen,
        block_tokens=block_tokens or _block_tokens(kv_layout, kv_heads, head_dim, chosen),
    )
    identity = ModelIdentity(
        name=name or str(path_or_hub_id).rstrip("/").rsplit("/", maxsplit=1)[-1],
        fingerprint=fingerprint(folder),
        architecture=architecture,
        dtype=chosen,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        vocab_tokens=config.vocab_size,
        context_tokens=config.max_position_embeddings,
    )
    return InspectedModel(folder=folder, config=config, identity=identity, layout=layout)


def _block_tokens(kv_layout: str, kv_heads: int, head_dim: int, dtype: str) -> int:
    if kv_layout == "virtual":
        return virtual_block_tokens(kv_heads, head_dim, dtype, mmap.PAGESIZE, HOST_LEAST_PAGE_BYTES)
    return _PAGED_BLOCK_TOKENS


def fingerprint(folder: Path) -> str:
    """128-bit hex digest of config.json and, per weight file, its name, size, header and 64 evenly spread samples.

    Reads at most 256 KiB per file, so that a large model starts fast: two checkpoints of equal shapes that differ in
    few bytes only may share a fingerprint; a training step changes almost every byte and so never does.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = read_json_object(folder / "config.json")
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(folder):
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}\0{size_bytes}\0".encode())
        digest.update(read_header(file))
        step_bytes = max(_SAMPLE_BYTES, size_bytes // _SAMPLES_PER_FILE)
        with file.open("rb") as stream:
            for offset in range(0, size_bytes, step_bytes):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    raw = read_json_object(path)
    require_known(str(raw.get("model_type")))
    require_possible(raw, path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        require_exact(config)
    except ConfigError:
        raise
    except Exception as error:  # a lying config makes the library raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    return config


def _choose_dtype(asked: str, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> str:
    if asked in DTYPES:
        return asked
    if asked != "auto":
        raise ConfigError(f"--dtype={asked!r}: must be auto or {' or '.join(DTYPES)}")
    own = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    if not own:
        kinds = sorted({tensor.dtype for tensor in stored.values()})
        own = _SAFETENSORS_DTYPES.get(kinds[0], kinds[0]) if len(kinds) == 1 else " and ".join(kinds)
    if own not in DTYPES:
        raise ConfigError(f"--dtype=auto: the checkpoint is in {own}; choose --dtype {' or '.join(DTYPES)}")
    return own
