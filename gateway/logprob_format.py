"""Log-probabilities in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any  # Any: JSON

from common.messages.requests import TokenLogprob
from gateway.tokens import Tokens

_LOWEST = -9999.0  # JSON has no minus infinity


def chat_logprobs(entries: Sequence[TokenLogprob], tokens: Tokens, top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice: one object per token, each with its `top` likeliest alternatives."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokens.text_of(token),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(tokens.bytes_of(token)),
        }

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(*alternative) for alternative in entry.top[:top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob], tokens: Tokens, top: int, offset: int) -> dict[str, Any]:
    """`logprobs` of a completion choice: parallel lists. `offset`: characters of the choice before these tokens.

    As in OpenAI's API the chosen token stands among the top ones even when it is not one of them.
    """
    texts = [tokens.text_of(entry.token) for entry in entries]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [
        {
            tokens.text_of(token): max(value, _LOWEST)
            for token, value in [*entry.top[:top], (entry.token, entry.logprob)]
        }
        for entry in entries
    ]
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
