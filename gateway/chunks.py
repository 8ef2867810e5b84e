"""Answers as bytes: server-sent events and whole JSON bodies, for completions and for chat.

What does not change between two chunks is encoded once per choice; a chunk of plain text costs one JSON string.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol  # Any: JSON

import msgspec

from gateway.answer import Piece
from gateway.logprob_format import chat_logprobs, completion_logprobs
from gateway.tokens import Tokens

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What every part of one answer repeats."""

    id: str
    created_unix_s: int
    model: str
    include_usage: bool
    token_ids: bool
    top_logprobs: int | None
    """None: the client wants no log-probabilities."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, in tokens."""

    prompt: int
    completion: int
    cached: int


class Writer(Protocol):
    """One answer's form. Characters of the choices written so far are counted inside."""

    def opening(self, index: int) -> bytes:
        """Chunk before the first text of a choice; may be empty."""
        ...

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Chunk with new text; empty if the piece has nothing that a client would see."""
        ...

    def closing_chunk(self, usage: Usage | None, extra: Mapping[str, Any]) -> bytes:
        """The chunk without choices that closes a stream: usage, if asked for, and fields of our own. Empty without both."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage, extra: Mapping[str, Any]) -> bytes:
        """The body of an answer that is not streamed; one piece per choice. `extra`: fields of our own."""
        ...


def error_chunk(body: bytes) -> bytes:
    """An error inside a running stream."""
    return b"data: " + body + b"\n\n"


def _usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _is_plain(heading: Heading, piece: Piece) -> bool:
    return piece.finish is None and not heading.token_ids and heading.top_logprobs is None


class _Frame:
    """The constant bytes around the `choices` of one answer's chunks."""

    def __init__(self, heading: Heading, kind: str) -> None:
        fields = {"id": heading.id, "object": kind, "created": heading.created_unix_s, "model": heading.model}
        self.start = b"data: " + _encode(fields)[:-1] + b',"choices":['
        self.end = b'],"usage":null}\n\n' if heading.include_usage else b"]}\n\n"

    def around(self, choice: dict[str, Any]) -> bytes:
        return self.start + _encode(choice) + self.end

    def closing(self, usage: Usage | None, extra: Mapping[str, Any]) -> bytes:
        fields = {**({} if usage is None else {"usage": _usage_fields(usage)}), **extra}
        return self.start + b"]," + _encode(fields)[1:] + b"\n\n" if fields else b""


class CompletionWriter:
    """Form of /v1/completions."""

    def __init__(self, heading: Heading, tokens: Tokens, n_choices: int) -> None:
        self._heading, self._tokens = heading, tokens
        self._frame = _Frame(heading, "text_completion")
        self._before = [self._frame.start + b'{"index":%d,"text":' % index for index in range(n_choices)]
        self._after = b',"logprobs":null,"finish_reason":null}' + self._frame.end
        self._offsets = [0] * n_choices

    def opening(self, index: int) -> bytes:
        """Completions have none."""
        return b""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """New text of one choice."""
        if _is_plain(self._heading, piece):
            return self._before[index] + _encode(piece.text) + self._after if piece.text else b""
        return self._frame.around(self._choice(index, piece))

    def closing_chunk(self, usage: Usage | None, extra: Mapping[str, Any]) -> bytes:
        """Closes the stream; empty if there is nothing to say."""
        return self._frame.closing(usage, extra)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}
        top = self._heading.top_logprobs
        if top is not None and piece.logprobs:
            logprobs = completion_logprobs(piece.logprobs, self._tokens, top, self._offsets[index])
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
            choice["logprobs"] = logprobs
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._heading.token_ids:
            choice["token_ids"] = piece.tokens
        return choice

    def whole(self, pieces: Sequence[Piece], usage: Usage, extra: Mapping[str, Any]) -> bytes:
        """The whole answer."""
        return _encode(
            {
                "id": self._heading.id,
                "object": "text_completion",
                "created": self._heading.created_unix_s,
                "model": self._heading.model,
                "choices": [self._choice(index, piece) for index, piece in enumerate(pieces)],
                "usage": _usage_fields(usage),
                **extra,
            }
        )


class ChatWriter:
    """Form of /v1/chat/completions."""

    def __init__(self, heading: Heading, tokens: Tokens, n_choices: int) -> None:
        self._heading, self._tokens = heading, tokens
        self._frame = _Frame(heading, "chat.completion.chunk")
        self._before = [self._frame.start + b'{"index":%d,"delta":{"content":' % index for index in range(n_choices)]
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._frame.end

    def opening(self, index: int) -> bytes:
        """Says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._frame.around({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk(self, index: int, piece: Piece) -> bytes:
        """New text of one choice."""
        if _is_plain(self._heading, piece):
            return self._before[index] + _encode(piece.text) + self._after if piece.text else b""
        delta = {"content": piece.text} if piece.text else {}
        return self._frame.around({"index": index, "delta": delta, **self._rest(piece)})

    def closing_chunk(self, usage: Usage | None, extra: Mapping[str, Any]) -> bytes:
        """Closes the stream; empty if there is nothing to say."""
        return self._frame.closing(usage, extra)

    def _rest(self, piece: Piece) -> dict[str, Any]:
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": piece.finish}
        top = self._heading.top_logprobs
        if top is not None and piece.logprobs:
            rest["logprobs"] = chat_logprobs(piece.logprobs, self._tokens, top)
        if piece.finish is not None:
            rest["stop_reason"] = piece.stop_reason
        if self._heading.token_ids:
            rest["token_ids"] = piece.tokens
        return rest

    def whole(self, pieces: Sequence[Piece], usage: Usage, extra: Mapping[str, Any]) -> bytes:
        """The whole answer."""
        choices = [
            {"index": index, "message": {"role": "assistant", "content": piece.text}, **self._rest(piece)}
            for index, piece in enumerate(pieces)
        ]
        return _encode(
            {
                "id": self._heading.id,
                "object": "chat.completion",
                "created": self._heading.created_unix_s,
                "model": self._heading.model,
                "choices": choices,
                "usage": _usage_fields(usage),
                **extra,
            }
        )
