"""What goes into the next engine step. Pure: views in, token counts out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that has pages and could take part in the step, oldest first in every list."""

    computed_tokens: int
    """Positions whose KV is in the pages."""
    known_tokens: int
    """Prompt plus generated tokens; always more than `computed_tokens`."""


@dataclass(frozen=True, slots=True)
class DecodeFirst:
    """Every decoding sequence gets its one token; what is left of the budget goes to prompts, oldest first.

    So a decoding request never waits for a whole prompt, only for one chunk of it. Chunks that do not finish their
    prompt end at a block border, so that every block of KV is complete when it is sent away.
    Source: chunked prefill with stall-free batching (Sarathi-Serve, arXiv 2403.02310, section 4.2).
    """

    max_step_tokens: int
    block_tokens: int

    def choose(self, candidates: Sequence[Candidate], limit_tokens: int | None = None) -> list[int]:
        """Tokens to compute per candidate, in the given order; 0 leaves it out of this step.

        `limit_tokens`: of the step in all, if that is less than `max_step_tokens`.
        """
        left_tokens = self.max_step_tokens if limit_tokens is None else min(limit_tokens, self.max_step_tokens)
        counts = [0] * len(candidates)
        for index, candidate in enumerate(candidates):
            if candidate.known_tokens - candidate.computed_tokens == 1 and left_tokens > 0:
                counts[index] = 1
                left_tokens -= 1
        for index, candidate in enumerate(candidates):
            if counts[index] == 0 and left_tokens > 0:
                counts[index] = self._chunk_tokens(candidate, left_tokens)
                left_tokens -= counts[index]
        return counts

    def _chunk_tokens(self, candidate: Candidate, left_tokens: int) -> int:
        wanted = candidate.known_tokens - candidate.computed_tokens
        if wanted <= left_tokens:
            return wanted
        end = candidate.computed_tokens + left_tokens
        return max(0, end - end % self.block_tokens - candidate.computed_tokens)
