"""Where a model comes from: a local folder, or the Hugging Face hub through its own client and cache."""

import re
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download

from common.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(path_or_hub_id: str) -> Path:
    """The folder that holds the model; downloads a hub id unless it is cached. Raises ConfigError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model={path_or_hub_id}: the folder has no config.json; it must hold a whole model")
        return folder
    if folder.is_absolute() or path_or_hub_id.startswith((".", "~")) or not _HUB_ID.fullmatch(path_or_hub_id):
        raise ConfigError(f"--model={path_or_hub_id}: no such folder, and not a hub id such as Qwen/Qwen2.5-0.5B")
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=_WANTED))
    except (OSError, ValueError, httpx.HTTPError) as error:  # the client's errors are all one of these
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--model={path_or_hub_id}: no such folder, and the hub did not give it ({reason}); "
            "check the name and the network, or download it and name the folder"
        ) from error
