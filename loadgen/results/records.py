"""What is known of one request after it ended. All times are seconds on the client's clock since the run's start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    CANCELLED = "cancelled"
    """The generator left on purpose."""
    REJECTED = "rejected"
    """HTTP 429 or 503: the server said that it is full."""
    HTTP_ERROR = "http_error"
    """Any other status than 200."""
    SERVER_ERROR = "server_error"
    """An error event inside the stream."""
    CONNECT = "connect"
    """No connection to the server."""
    TIMEOUT = "timeout"
    CUT = "cut"
    """The stream ended before `[DONE]`."""
    BAD_STREAM = "bad_stream"
    """The answer is not a stream of OpenAI's chunks."""
    EMPTY = "empty"
    """The stream ended well and had no token in it."""

    @property
    def failed(self) -> bool:
        """True unless the request was answered or left on purpose."""
        return self not in (Outcome.OK, Outcome.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, from its planned time to its end."""

    index: int
    """Unique in the run; in the order of sending where one process sends."""
    request_id: str
    """The `x-request-id` it was sent with."""
    conversation: int = 0
    turn: int = 0
    """Place in the conversation, from 0."""
    group: str = ""
    """The workload's name for this kind of request."""
    measured: bool = True
    """False for warm-up and cool-down: counted in throughput, not in latency."""
    held_s: float = 0.0
    """How long a cap on concurrency held it back; not part of any latency."""
    waited_s: float = 0.0
    """How long its own arrival had passed when the answer before it came; not part of any latency."""
    planned_s: float
    """When it was due: its arrival, or the end of the turn before and the time to think, whichever is later."""
    sent_s: float
    """When the client began to send; connecting, where a new connection was needed, counts as latency."""
    end_s: float
    outcome: Outcome
    detail: str = ""
    """Why it failed; empty if it did not."""
    http_status: int | None = None
    asked_input_tokens: int | None
    """None: only the server can count it, as with text."""
    asked_output_tokens: int
    input_tokens: int | None = None
    """As the server counted; None if it did not say."""
    output_tokens: int = 0
    """From the server's usage, else from token ids, else the number of chunks."""
    counted_by: str = "chunks"
    """Where `output_tokens` comes from: usage, token_ids or chunks."""
    cached_tokens: int | None = None
    """Prompt tokens that the server found in its cache; None if it did not say."""
    finish_reason: str | None = None
    workers: Mapping[str, str] = field(default_factory=dict)
    """Who served it by phase (`prefill`, `decode`); empty where the server does not tell."""
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """Parts of the time to first token as the server measured them; empty where it does not tell."""
    chunk_s: Sequence[float] = ()
    """Arrival of each content chunk. Chunks without text and without tokens (a role, a finish reason) do not count."""
    chunk_tokens: Sequence[int] | None = None
    """Tokens in each of those chunks; None where the server does not tell."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt: as the server counted it, else as asked for, else 0."""
        return self.input_tokens if self.input_tokens is not None else self.asked_input_tokens or 0

    @property
    def arrived_s(self) -> float:
        """When somebody wanted it, whatever held it back on this side; the generator's lateness is left out."""
        return self.sent_s - self.held_s - self.waited_s

    @property
    def send_lag_s(self) -> float:
        """Seconds that the generator was late; what a cap held back on purpose is not lateness."""
        return self.sent_s - self.planned_s - self.held_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: first content chunk - sent."""
        return self.chunk_s[0] - self.sent_s if self.chunk_s else None

    @property
    def ttst_s(self) -> float | None:
        """Time to second token; None if there is none, or nobody can tell which chunk holds it."""
        if self.chunk_tokens is not None and self.chunk_tokens and self.chunk_tokens[0] > 1:
            return self.ttft_s
        return self.chunk_s[1] - self.sent_s if len(self.chunk_s) > 1 else None

    @property
    def e2e_s(self) -> float | None:
        """End to end latency: last content chunk - sent."""
        return self.chunk_s[-1] - self.sent_s if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (output tokens - 1); None for a single token."""
        if not self.chunk_s or self.output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    def chunk_gaps_s(self) -> list[float]:
        """Time between neighbouring content chunks."""
        return [later - sooner for sooner, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    def token_gaps_s(self) -> list[float]:
        """Inter-token latencies: a chunk of k tokens after a gap g counts k times g / k.

        Where the server does not tell k, every chunk after the first is taken to hold the same number of tokens,
        and counts once.
        """
        gaps_s = self.chunk_gaps_s()
        if self.chunk_tokens is not None:
            return [gap_s / k for gap_s, k in zip(gaps_s, self.chunk_tokens[1:], strict=True) for _ in range(k)]
        if not gaps_s:
            return []
        tokens_per_chunk = max(1.0, (self.output_tokens - 1) / len(gaps_s))
        return [gap_s / tokens_per_chunk for gap_s in gaps_s]
