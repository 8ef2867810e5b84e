"""What one engine step computes, and what comes out of it. The border between scheduler and engine."""

from dataclasses import dataclass

from common.ids import RequestId
from common.messages.requests import Sampling, TokenLogprob
from kvstore.index.page_table import PageTable


def has_penalties(sampling: Sampling) -> bool:
    """Whether the choice of a token depends on those before it other than by the logits."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def draws_on_host(sampling: Sampling) -> bool:
    """Whether more is needed for the next token than its logits and numbers known beforehand."""
    return sampling.logprobs is not None or has_penalties(sampling)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in a step: one token when decoding, a chunk of the prompt when prefilling.

    `tokens` and `table` belong to the scheduler. While the step is in flight it only appends to them: the token that an
    earlier step draws, pages for a later step.
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
    """True if the last of the tokens known, or pending, is in this segment: the next one is drawn from its row."""
    streamed: bool = False
    """True if the shell wants to hear of every layer as soon as its K and V are written."""
    pending: bool = False
    """True if its one token is what the step before draws: when planned, start == len(tokens). The engine must take it
    from that step's outcome, since nobody says when `tokens` gets it."""

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

    rings: tuple[int, ...] = ()
    """Whose layers share pages: wait for each layer before writing it."""

    @property
    def n_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum(segment.count for segment in self.segments)

    @property
    def may_overlap(self) -> bool:
        """Whether another such step may be in flight at the same time: the host has no part in either before it ends."""
        return not self.loads and not any(
            segment.streamed or (segment.sample and draws_on_host(segment.sampling)) for segment in self.segments
        )


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
    """Of this step alone: counted from the end of the step before, if it was launched earlier."""
