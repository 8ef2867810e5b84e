"""Bodies of requests as OpenAI's API and vLLM's additions define them.

Types are checked strictly: no text for a number, no true for 1. Unknown fields are ignored, as vLLM does (OpenAI refuses
them): clients send what other servers understand. Which ones is told, so that a typo shows. Fields that are known, change
the answer and are not supported here are refused by name when they ask for something.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar  # Any: fields that are read only to be refused

import msgspec

from common.errors import InvalidRequest
from gateway.ignored_fields import IgnoredFields, ignored_fields

T = TypeVar("T", bound="AnswerRequest")
Tell = Callable[[IgnoredFields], None]
_PATH = re.compile(r" - at `\$\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]+)`")


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to stream."""

    include_usage: bool | None = None


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share. None always means: the default."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    priority: int | None = None

    logit_bias: Any = None
    min_tokens: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    prompt_logprobs: Any = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    response_format: Any = None


class CompletionRequest(AnswerRequest, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None

    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    prompt_embeds: Any = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(AnswerRequest, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
"""Fields that are not supported, with the values besides null that ask for nothing."""


class _KnownCompletion(CompletionRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One without unknown fields."""


class _KnownChat(ChatRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One without unknown fields."""


class _Form(Generic[T]):
    """How bodies of one kind are read: first as one without unknown fields, which costs nothing more if there are none."""

    def __init__(self, kind: type[T], known: type[T]) -> None:
        self.names = frozenset(kind.__struct_encode_fields__)
        self.any, self.known = msgspec.json.Decoder(kind), msgspec.json.Decoder(known)


_completion, _chat = _Form(CompletionRequest, _KnownCompletion), _Form(ChatRequest, _KnownChat)
_UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MOST_COLONS = 4096
"""Every field has one. Of a body with more the first unknown field is told: to look at all would hold others up."""
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def read_completion(body: bytes, note: Tell) -> CompletionRequest:
    """Parse a body. Raises InvalidRequest naming the field, what it was and what it must be.

    `note`: told of unknown fields, if there are any, before anything is returned or, of short bodies, raised.
    """
    return _read(_completion, body, note)


def read_chat(body: bytes, note: Tell) -> ChatRequest:
    """As `read_completion`."""
    return _read(_chat, body, note)


def _read(form: _Form[T], body: bytes, note: Tell) -> T:
    try:
        request = form.known.decode(body)
    except _UNREADABLE as error:
        request = _read_any(form, body, str(error), note)
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            raise InvalidRequest(f"{name} is not supported here; leave it out", param=name)
    return request


def _read_any(form: _Form[T], body: bytes, first: str, note: Tell) -> T:
    """One with unknown fields, or none that can be read. `first`: what was found wrong with it, before anything else."""
    if body.count(b":") <= _MOST_COLONS:
        with suppress(*_UNREADABLE):  # an InvalidRequest passes
            if unknown := _fields.decode(body).keys() - form.names:
                note(ignored_fields(unknown))
            return _decode(form.any, body)
    request = _decode(form.any, body)
    named = _UNKNOWN.search(first)
    note(ignored_fields([named[1] if named else ""], all_of_them=False))
    return request


def _decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _bad_field(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body must be UTF-8: byte {error.object[error.start]:#04x} is not") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body must be JSON: {error}") from error


def _bad_field(text: str) -> InvalidRequest:
    """msgspec's 'Expected `int | null`, got `str` - at `$.max_tokens`' as a sentence about the field."""
    missing = _MISSING.search(text)
    path = _PATH.search(text)
    where = path[1] if path is not None else ""
    if missing is not None:
        name = f"{where}.{missing[1]}" if where else missing[1]
        return InvalidRequest(f"{name} is required", param=name)
    reason = _PATH.sub("", text).replace("`", "")
    if not where:
        return InvalidRequest(f"the body must be a JSON object: {reason}")
    return InvalidRequest(f"{where}: {reason[:1].lower()}{reason[1:]}", param=where)
