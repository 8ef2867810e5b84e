"""What one engine step computes, and what comes out of it. The border between scheduler and engine."""

from dataclasses import dataclass

from common.ids import RequestId
from common.messages.requests import Sampling, TokenLogprob
from kvstore.index.page_table import PageTable


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in a step: one token when decoding, a chunk of the prompt when prefilling.

    `tokens` and `table` belong to the scheduler, which leaves them alone while the step runs.
    """

    request: RequestId
    tokens: list[int]
    """Prompt and all tokens generated so far."""
    prompt_tokens: int
    """How many of `tokens` the client sent: the rest is output, also what an earlier worker emitted. Penalties of OpenAI's
    kind count only that."""
    start: int
    """Position of the first token to compute; KV of all positions before it is in the pages."""
    count: int
    table: PageTable
    """Holds pages for at least start + count tokens."""
    sampling: Sampling
    sample: bool
    """True if start + count == len(tokens): the next token is drawn from the last row."""
    pending: bool = False
    """True if its last token is the one that the step before draws for this request: not in `tokens` yet."""
    streamed: bool = False
    """True if the shell wants to hear of every layer as soon as its K and V are written."""

    @property
    def output_position(self) -> int:
        """Output index t of the token this segment samples; with the seed it fixes the random number."""
        return self.start + self.count - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a flat batch. Decoding segments come first, then prefilling ones."""

    number: int
    segments: tuple[Segment, ...]
    loads: tuple[int, ...] = ()
    """Fetches into these segments' pages that may not have ended: wait for each layer of them before reading it."""

    @property
    def n_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum(segment.count for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one sequence."""

    request: RequestId
    token: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry in `sampled` per segment whose `sample` is True, in the order of the plan."""

    number: int
    sampled: tuple[Sampled, ...]
    compute_ms: float
