"""A client's parameters, checked and turned into what workers understand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import ContextTooLong, InvalidRequest
from common.messages.requests import Sampling
from common.messages.sampling_ranges import MAX_TOP_LOGPROBS, RANGES, SEEDS
from gateway.openai_schema import AnswerRequest, ChatMessage, ChatRequest, CompletionRequest

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 512
MAX_STOP_TOKEN_IDS = 256
MAX_CACHE_SALT_CHARACTERS = 256
_COMPLETION_TOKENS = 16  # what OpenAI's completions give when max_tokens is left out


@dataclass(frozen=True, slots=True)
class Limits:
    """What this deployment allows."""

    vocab_tokens: int
    context_tokens: int
    end_tokens: tuple[int, ...]
    default_max_tokens: int | None
    """Answer length where the client gives none; None: 16 for completions, the rest of the context for chat."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the gateway itself does with the tokens."""

    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool
    choices_per_prompt: int


def read_wishes(request: AnswerRequest) -> Wishes:
    """Raises InvalidRequest."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}", param="stop"
            )
    n = 1 if request.n is None else request.n
    if not 1 <= n <= 128:
        raise InvalidRequest(f"n must be 1 to 128, not {n}", param="n")
    stream = bool(request.stream)
    if request.stream_options is not None and not stream:
        raise InvalidRequest("stream_options is allowed only with stream: true", param="stream_options")
    return Wishes(
        stops=tuple(stops),
        stream=stream,
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        token_ids=bool(request.return_token_ids),
        choices_per_prompt=n,
    )


def read_cache_salt(request: AnswerRequest) -> str:
    """What sets a request's cached KV apart from that of others; empty if the client gives none.

    An empty salt is refused: a client that sends one has lost its own, and would share with everybody.
    Raises InvalidRequest.
    """
    salt = request.cache_salt
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_CACHE_SALT_CHARACTERS:
        text = f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARACTERS} characters, not {len(salt)}; or leave it out"
        raise InvalidRequest(text, param="cache_salt")
    return salt


def read_sampling(request: CompletionRequest | ChatRequest, limits: Limits, prompt_tokens: int, seed: int) -> Sampling:
    """Raises InvalidRequest or ContextTooLong. `seed` is this choice's own: of the client's, or drawn."""
    temperature = _within(request.temperature, "temperature", default=1.0)
    top_p = _within(request.top_p, "top_p", default=1.0)
    if top_p == 0.0:
        raise InvalidRequest("top_p must be above 0", param="top_p")
    if request.seed is not None and not -SEEDS <= request.seed < SEEDS:
        raise InvalidRequest(f"seed must be a 64-bit number, not {request.seed}", param="seed")
    return Sampling(
        max_tokens=_max_tokens(request, limits, prompt_tokens),
        temperature=temperature,
        top_k=_top_k(request.top_k, limits.vocab_tokens),
        top_p=top_p,
        min_p=_within(request.min_p, "min_p", default=0.0),
        presence_penalty=_within(request.presence_penalty, "presence_penalty", default=0.0),
        frequency_penalty=_within(request.frequency_penalty, "frequency_penalty", default=0.0),
        repetition_penalty=_within(request.repetition_penalty, "repetition_penalty", default=1.0),
        seed=seed % SEEDS,
        stop_token_ids=_stop_token_ids(request, limits),
        logprobs=_logprobs(request),
    )


def _within(value: float | None, name: str, *, default: float) -> float:
    low, high = RANGES[name]
    if value is None:
        return default
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be {low:g} to {high:g}, not {value:g}", param=name)
    return value


def _top_k(value: int | None, vocab_tokens: int) -> int | None:
    """0 and -1 both mean: all tokens, as in vLLM; and so does, as there, any number that leaves none out."""
    if value is None or value in (0, -1):
        return None
    if value < 1:
        raise InvalidRequest(f"top_k must be 1 or more, or -1 for all tokens, not {value}", param="top_k")
    return value if value < vocab_tokens else None


def _stop_token_ids(request: AnswerRequest, limits: Limits) -> tuple[int, ...]:
    ids = request.stop_token_ids or []
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids may have {MAX_STOP_TOKEN_IDS} entries at most", param="stop_token_ids")
    for token in ids:
        if not 0 <= token < limits.vocab_tokens:
            raise InvalidRequest(
                f"stop_token_ids has {token}; this model's token ids are 0 to {limits.vocab_tokens - 1}",
                param="stop_token_ids",
            )
    return tuple(dict.fromkeys([*ids, *(() if request.ignore_eos else limits.end_tokens)]))


def _logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        name, count = "logprobs", request.logprobs
    else:
        name, count = "top_logprobs", request.top_logprobs
        if not request.logprobs:
            if count:
                raise InvalidRequest("top_logprobs is allowed only with logprobs: true", param="top_logprobs")
            return None
        count = count or 0
    if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"{name} must be 0 to {MAX_TOP_LOGPROBS}, not {count}", param=name)
    return count


def _max_tokens(request: CompletionRequest | ChatRequest, limits: Limits, prompt_tokens: int) -> int:
    name, asked = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", request.max_completion_tokens
    if asked is not None and asked < 1:
        raise InvalidRequest(f"{name} must be 1 or more, not {asked}", param=name)
    room = limits.context_tokens - prompt_tokens
    if asked is None:
        if room < 1:
            raise _too_long(request, limits, prompt_tokens, 1)
        default = limits.default_max_tokens
        if default is None:
            default = _COMPLETION_TOKENS if isinstance(request, CompletionRequest) else room
        return min(default, room)
    if asked > room:
        raise _too_long(request, limits, prompt_tokens, asked)
    return asked


def _too_long(
    request: CompletionRequest | ChatRequest, limits: Limits, prompt_tokens: int, output_tokens: int
) -> ContextTooLong:
    """Names the prompt, also where fewer tokens of output would do: that is the field that OpenAI names."""
    return ContextTooLong(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        limit_tokens=limits.context_tokens,
        param="messages" if isinstance(request, ChatRequest) else "prompt",
    )


def read_messages(messages: Sequence[ChatMessage]) -> list[Mapping[str, str]]:
    """A conversation as chat templates take it. Raises InvalidRequest naming the message."""
    if not messages:
        raise InvalidRequest("messages must have at least one message", param="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: ChatMessage, where: str) -> Mapping[str, str]:
    # Templates know `system`; `developer` is OpenAI's newer name for it.
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(
            f"{where}.role must be system, developer, user or assistant, not {message.role!r}", param=f"{where}.role"
        )
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(f"{where}.{name} is not supported here", param=f"{where}.{name}")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts: list[str] = []
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if part.type != "text":
            raise InvalidRequest(f"{place}.type must be text, not {part.type!r}", param=f"{place}.type")
        if part.text is None:
            raise InvalidRequest(f"{place}.text is required", param=f"{place}.text")
        texts.append(part.text)
    return {"role": role, "content": "\n".join(texts)}
