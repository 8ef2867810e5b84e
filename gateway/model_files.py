"""What the gateway needs of a model: tokenizer, chat template and limits, read without torch and without weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: parsed JSON

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from common.errors import ConfigError
from common.model_config import decoder_part, read_json_object, require_possible

_WANTED = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "special_tokens_map.json")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The readable part of a checkpoint."""

    name: str
    """Last part of the folder's path or hub id: what clients call it unless the operator says otherwise."""
    tokenizer_file: Path
    vocab_tokens: int
    """Token ids are 0 .. vocab_tokens - 1."""
    context_tokens: int
    """Prompt plus answer; a worker may have a lower limit."""
    end_tokens: tuple[int, ...]
    """End-of-sequence ids, as `transformers.generate` would use them."""
    special_tokens: Mapping[str, str]
    """bos_token and the like, for chat templates."""
    chat_template: str | None


def read_model_files(model: str) -> ModelFiles:
    """Read a folder, or a hub id's files. Raises ConfigError that says what is missing where."""
    folder = _folder(model)
    found = _read_json(folder / "config.json")
    require_possible(found, folder / "config.json")
    config = decoder_part(found)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"model={model!r}: {folder} has no tokenizer.json; save the tokenizer in its fast format there"
        )
    for key in ("vocab_size", "max_position_embeddings"):
        if config.get(key) is None:
            raise ConfigError(f"model={model!r}: {folder / 'config.json'} must give {key} as a whole number")
    tokenizer_config = _read_json(folder / "tokenizer_config.json", optional=True)
    return ModelFiles(
        name=Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2],
        tokenizer_file=tokenizer_file,
        vocab_tokens=config["vocab_size"],
        context_tokens=config["max_position_embeddings"],
        end_tokens=_end_tokens(folder, config, _read_json(folder / "generation_config.json", optional=True)),
        special_tokens=_special_tokens(tokenizer_config),
        chat_template=_chat_template(folder, tokenizer_config),
    )


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED)))
    except HFValidationError as error:
        raise ConfigError(f"model={model!r}: must be an existing folder or a hub id such as org/name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(f"model={model!r}: no such folder, and the hub did not give it: {error}") from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if path.exists():
        return read_json_object(path)
    if optional:
        return {}
    raise ConfigError(f"{path} is missing; the model's folder must hold it")


def _end_tokens(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    if found is None:
        return ()
    tokens = tuple(found) if isinstance(found, list) else (found,)
    if any(type(token) is not int or token < 0 for token in tokens):
        raise ConfigError(f"{folder}: eos_token_id must be a token id, or a list of them; it is {str(found)[:60]}")
    return tokens


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        token = tokenizer_config.get(name)
        if isinstance(token, Mapping):  # an AddedToken written out
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template file wins over the older place in tokenizer_config.json; of several named ones, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, Mapping)]
        found = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None
