"""KV layout of a model from its config.json alone, so that a KV store needs no torch."""

from pathlib import Path

import httpx
from huggingface_hub import hf_hub_download

from common.errors import ConfigError
from common.kv_layout import DTYPE_BYTES, KvLayout
from common.model_config import decoder_part, read_json_object, require_possible


def model_layout(model: str, dtype: str) -> KvLayout:
    """Layout of the KV of `model` (a folder or a hub id); `dtype` auto takes the checkpoint's. Raises ConfigError."""
    path = _config_path(model)
    config = read_json_object(path)
    require_possible(config, path)
    text = decoder_part(config)
    if dtype == "auto":
        dtype = text.get("dtype") or text.get("torch_dtype") or ""
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ConfigError(f"--model={model}: its dtype is {dtype!r}; give --dtype {', '.join(DTYPE_BYTES)}")
    try:
        heads = int(text["num_attention_heads"])
        return KvLayout(
            layers=int(text["num_hidden_layers"]),
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
            dtype=dtype,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--model={model}: {path} does not describe a decoder model ({error!r})") from error


def _config_path(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError, httpx.HTTPError) as error:  # the client's errors are all one of these
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model={model}: no such folder, and the hub did not give it ({reason})") from error
