"""JSON schemas of answers, of the events of streams, and of errors."""

from typing import Any  # Any: JSON

Schema = dict[str, Any]
_NULL: Schema = {"type": "null"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}


def ref(name: str) -> Schema:
    """A schema of `#/components/schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


_FINISH: Schema = {"enum": ["stop", "length"]}
_EXTRA = {"stop_reason": {"type": ["string", "integer", "null"]}, "token_ids": _list(_COUNT)}
_TOKEN = _object(token=_TEXT, logprob=_NUMBER, bytes=_list(_COUNT))
_CHAT_LOGPROBS = _object(content=_list({"allOf": [_TOKEN, _object(top_logprobs=_list(_TOKEN))]}), refusal=_NULL)
_COMPLETION_LOGPROBS = _object(
    tokens=_list(_TEXT),
    token_logprobs=_list(_NUMBER),
    top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
    text_offset=_list(_COUNT),
)
_HOW = {"penstock": {"type": "object", "description": "Phases and workers; with x-penstock-explain: 1."}}
_DELTA: Schema = {"type": "object", "properties": {"role": {"const": "assistant"}, "content": _TEXT}}


def _answer(kind: str, choice: Schema) -> Schema:
    fields = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT, "choices": _list(choice)}
    return _object(_HOW, **fields, usage=ref("Usage"))


def _chunk(kind: str, choice: Schema) -> Schema:
    fields = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT, "choices": _list(choice)}
    return _object({**_HOW, "usage": _or_null(ref("Usage"))}, **fields)


def answer_schemas() -> dict[str, Schema]:
    """By name, for `#/components/schemas`."""
    completion = {"index": _COUNT, "text": _TEXT, "logprobs": _or_null(_COMPLETION_LOGPROBS)}
    chat = {"index": _COUNT, "logprobs": _or_null(_CHAT_LOGPROBS)}
    message = _object(role={"const": "assistant"}, content=_TEXT)
    error = _object(
        message=_TEXT, type={"enum": ["invalid_request_error", "server_error"]}, param=_or_null(_TEXT), code=_TEXT
    )
    return {
        "Error": _object(error=error),
        "Usage": _object(
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object(cached_tokens=_COUNT),
        ),
        "Completion": _answer("text_completion", _object(_EXTRA, **completion, finish_reason=_FINISH)),
        "CompletionChunk": _chunk("text_completion", _object(_EXTRA, **completion, finish_reason=_or_null(_FINISH))),
        "Chat": _answer("chat.completion", _object(_EXTRA, **chat, message=message, finish_reason=_FINISH)),
        "ChatChunk": _chunk(
            "chat.completion.chunk", _object(_EXTRA, **chat, delta=_DELTA, finish_reason=_or_null(_FINISH))
        ),
        "Model": _object(
            id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by={"const": "penstock"}, max_model_len=_COUNT
        ),
        "Models": _object(object={"const": "list"}, data=_list(ref("Model"))),
        "Alive": _object(status={"const": "alive"}),
        "Ready": _object(status={"const": "ready"}),
        "Status": _object(gateway=_object(id=_TEXT, ready={"type": "boolean"}), workers=_list(_object(id=_TEXT))),
        "MemoryHistory": _object(every_s=_NUMBER, samples=_list(_object(unix_ms=_COUNT, workers={"type": "object"}))),
        "Drained": _object(worker=_TEXT, state={"enum": ["draining", "resuming"]}),
        "Resized": _object(
            worker=_TEXT,
            state={"enum": ["resized", "leaving"]},
            device_memory_bytes=_COUNT,
            target_bytes=_COUNT,
            pages=_COUNT,
            leaving_pages=_COUNT,
        ),
    }
