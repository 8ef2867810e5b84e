"""What a client wants, as the gateway's cores see it."""

from dataclasses import dataclass

from common.ids import RequestId
from common.messages.requests import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One prompt to answer."""

    request: RequestId
    """Unique among all requests that any worker may remember."""
    prompt: tuple[int, ...]
    sampling: Sampling
    model: str
    cache_salt: str = ""
    """As in Generate."""
    priority: int = 0
    """Lower goes first."""
    key: str = ""
    """Name of the API key it came with; empty without keys."""
    session: str | None = None
    """What the `session` rule keeps on one worker."""
    prefill_rule: str | None = None
    decode_rule: str | None = None
    """Routing rules that the client asked for."""
    explain: bool = False
    """Whether the client wants to know how it was routed."""
