"""JSON schemas of request bodies: what the types of openai_schema.py say, narrowed by what is checked after them."""

from typing import Any  # Any: JSON

import msgspec

from common.messages.sampling_ranges import MAX_TOP_LOGPROBS, RANGES, SEEDS
from gateway.openai_schema import NEUTRAL, ChatRequest, CompletionRequest
from gateway.routing_wishes import MAX_PRIORITY, MAX_SESSION_CHARACTERS
from gateway.sampling import MAX_CACHE_SALT_CHARACTERS, MAX_STOP_CHARACTERS, MAX_STOP_TOKEN_IDS, MAX_STOPS

Schema = dict[str, Any]
_LARGEST = 2**63 - 1
TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": _LARGEST}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_NULL: Schema = {"type": "null"}


def _count(low: int, high: int = _LARGEST) -> Schema:
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, _NULL], "default": None}


def _text(low: int, high: int) -> Schema:
    return {"anyOf": [{"type": "string", "minLength": low, "maxLength": high}, _NULL], "default": None}


def _some(items: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "minItems": 1, "items": items, **({} if most is None else {"maxItems": most})}


_NARROWED: dict[str, Schema] = {
    **{
        name: {
            "anyOf": [
                {"type": "number", ("exclusiveMinimum" if name == "top_p" else "minimum"): low, "maximum": high},
                _NULL,
            ],
            "default": None,
        }
        for name, (low, high) in RANGES.items()
    },
    "max_tokens": _count(1),
    "max_completion_tokens": _count(1),
    "n": _count(1, 128),
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, _NULL], "default": None},
    "seed": _count(-SEEDS, SEEDS - 1),
    "user": _text(0, MAX_SESSION_CHARACTERS),
    "prompt_cache_key": _text(0, MAX_SESSION_CHARACTERS),
    "top_k": _count(-1),
    "stop_token_ids": {
        "anyOf": [{"type": "array", "items": TOKEN, "maxItems": MAX_STOP_TOKEN_IDS}, _NULL],
        "default": None,
    },
    "cache_salt": _text(1, MAX_CACHE_SALT_CHARACTERS),
    "priority": _count(0, MAX_PRIORITY),
    "top_logprobs": _count(0, MAX_TOP_LOGPROBS),
}
_COMPLETION: dict[str, Schema] = {
    "logprobs": _count(0, MAX_TOP_LOGPROBS),
    "prompt": {
        "description": "A text, texts, token ids, or lists of token ids. Prompts times n: 128 at most.",
        "anyOf": [
            {"type": "string", "minLength": 1},
            _some({"type": "string", "minLength": 1}, 128),
            _some(TOKEN),
            _some(_some(TOKEN), 128),
        ],
    },
}
_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
        "name": {"anyOf": [{"type": "string"}, _NULL]},
    },
    "required": ["role", "content"],
}
_CHAT: dict[str, Schema] = {
    "messages": _some({"$ref": "#/components/schemas/ChatMessage"}),
    "top_logprobs": _count(0, MAX_TOP_LOGPROBS),
}


def body_schemas() -> dict[str, Schema]:
    """By name, for `#/components/schemas`. Unknown fields are ignored and told, so none are forbidden."""
    _, found = msgspec.json.schema_components(
        [CompletionRequest, ChatRequest], ref_template="#/components/schemas/{name}"
    )
    found = {name: found[name] for name in ("CompletionRequest", "ChatRequest", "StreamOptions")}
    for name, own in (("CompletionRequest", _COMPLETION), ("ChatRequest", _CHAT)):
        properties = found[name]["properties"]
        for field in properties:
            if field in NEUTRAL:
                values = [None, *NEUTRAL[field]]
                properties[field] = {"enum": values, "description": "Not supported: leave it out.", "default": None}
        properties.update({field: schema for field, schema in _NARROWED.items() if field in properties})
        properties.update(own)
    order: Schema = {
        "type": "object",
        "properties": {"device_memory": {"anyOf": [{"type": "string"}, {"type": "integer"}], "examples": ["6GiB"]}},
        "required": ["device_memory"],
        "additionalProperties": False,
    }
    return {**found, "ChatMessage": _MESSAGE, "MemoryOrder": order}
