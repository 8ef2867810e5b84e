"""HTTP bodies of generation requests. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any  # Any: JSON that the user adds to each body

import msgspec

from loadgen.workload.plan import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyForm:
    """What all bodies of a run have in common."""

    endpoint: str
    """`completions` or `chat`."""
    model: str
    ignore_eos: bool = True
    """Ask the server to go on to the full length; without it random prompts end early and lengths mean nothing."""
    token_ids: bool = True
    """Ask for `token_ids` in every chunk, so that tokens per chunk are known and not estimated."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that win over ours."""

    @property
    def path(self) -> str:
        """Where requests go, below the server's root."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: Mapping[str, Any], turn: Turn) -> bytes:
        """The body of one turn; `prompt` is its `prompt` or `messages` field."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": turn.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **prompt,
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.token_ids:
            fields["return_token_ids"] = True
        return msgspec.json.encode(fields | dict(self.extra))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingRequest:
    """One request, ready to be sent."""

    index: int
    conversation: int
    turn: int
    group: str
    request_id: str
    session: str
    body: bytes
    input_tokens: int | None
    """None: text."""
    output_tokens: int
    """As asked for; what the server counts may differ."""
    cancel_after_tokens: int | None = None
    keeps_answer: bool = False
    """The answer is needed for the next turn."""
