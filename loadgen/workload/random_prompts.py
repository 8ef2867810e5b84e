"""What is sent: lengths, prompts, cancellations and HTTP bodies of a run. Pure: all of it follows from the seed.

Prompts are random tokens, so no two share a prefix and none is in a server's cache, unless a seed is used again.
Bodies are built before the run, at about four bytes per prompt token, so that building them never delays a send.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any  # Any: JSON that the user adds to each body

import msgspec

from loadgen.workload.lengths import LengthLaw

_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The recipe of a run's requests."""

    endpoint: str
    """`completions` sends token ids; `chat` sends one message of random words, one word per token asked for."""
    model: str
    seed: int
    input_lengths: LengthLaw
    output_lengths: LengthLaw
    ignore_eos: bool = True
    """Ask the server to go on to the full length; without it random prompts end early and lengths mean nothing."""
    token_ids: bool = True
    """Ask for `token_ids` in every chunk, so that tokens per chunk are known and not estimated."""
    first_token_id: int = 10
    last_token_id: int = 250
    """Prompts are drawn from these ids, both included; every tokenizer in use has the default ones."""
    cancel_rate: float = 0.0
    """Share of requests that the client leaves, after a number of tokens drawn evenly from 0 to the length - 1."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The URL path that requests go to, below the server's root."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request, ready to be sent."""

    index: int
    body: bytes
    input_tokens: int
    output_tokens: int
    """As asked for; what the server counts may differ."""
    cancel_after_tokens: int | None = None
    """Leave once so many tokens came; 0: at once after sending; None: stay to the end."""


def plan_requests(workload: Workload, n_requests: int, part: str = "run") -> list[PlannedRequest]:
    """The first `n_requests` of a workload. Another `part` (such as `warmup`) gives other prompts of the same kind."""
    lengths, cancels = Random(f"{workload.seed}/{part}/lengths"), Random(f"{workload.seed}/{part}/cancels")
    planned = []
    for index in range(n_requests):
        input_tokens = workload.input_lengths.draw_tokens(lengths)
        output_tokens = workload.output_lengths.draw_tokens(lengths)
        # Both are drawn for every request, so that the same requests stay cancelled when lengths change.
        cancelled, point = cancels.random() < workload.cancel_rate, cancels.random()
        prompt = Random(f"{workload.seed}/{part}/prompt/{index}")
        planned.append(
            PlannedRequest(
                index=index,
                body=_body(workload, prompt, input_tokens, output_tokens),
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                cancel_after_tokens=int(point * output_tokens) if cancelled else None,
            )
        )
    return planned


def _body(workload: Workload, random: Random, input_tokens: int, output_tokens: int) -> bytes:
    fields: dict[str, Any] = {
        "model": workload.model,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if workload.endpoint == "chat":
        fields["messages"] = [{"role": "user", "content": _words(random, input_tokens)}]
    else:
        fields["prompt"] = random.choices(range(workload.first_token_id, workload.last_token_id + 1), k=input_tokens)
    if workload.ignore_eos:
        fields["ignore_eos"] = True
    if workload.token_ids:
        fields["return_token_ids"] = True
    fields.update(workload.extra_body)
    return msgspec.json.encode(fields)


def _words(random: Random, n_words: int) -> str:
    syllables = random.choices(_SYLLABLES, k=2 * n_words)
    return " ".join(map("".join, zip(syllables[::2], syllables[1::2], strict=True)))
