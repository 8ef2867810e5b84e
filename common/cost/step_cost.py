"""What a worker's engine step costs, as a formula with five fitted numbers, and what follows from it.

    step [ms] = base + token * new tokens + pair * attention pairs + row * decoding sequences + kv * KV tokens they read

A prompt of x tokens of which y are cached computes n = x - y tokens and n * y + n * (n + 1) / 2 attention pairs.
Source: MemServe (arXiv 2406.17565, section 5.4), whose terms c * x + b * x^2 + a * x^2 * y these are, written for tokens
instead of ratios. Non-negative numbers make both functions grow with work, whatever was measured.
"""

import msgspec


class StepCost(msgspec.Struct, frozen=True, array_like=True):
    """Travels in reports. All numbers are milliseconds, not negative."""

    base_ms: float
    """Of any step."""
    token_ms: float
    """Per prompt token computed."""
    pair_ms: float
    """Per pair of a computed token and a token before it."""
    row_ms: float
    """Per decoding sequence."""
    kv_ms: float
    """Per token of KV that decoding sequences read."""
    chunk_tokens: int
    """Prompt tokens of one step at the most."""
    n_samples: int = 0
    """Steps that it was fitted to; 0: a guess."""

    def exec_ms(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Time to compute a prompt alone. The last token is always computed, however much is cached."""
        cached = max(0, min(cached_tokens, prompt_tokens - 1))
        new = prompt_tokens - cached
        n_steps = -(-new // self.chunk_tokens)
        pairs = new * cached + new * (new + 1) / 2
        return n_steps * self.base_ms + new * self.token_ms + pairs * self.pair_ms

    def step_ms(self, batch: int, kv_tokens: int) -> float:
        """Time of one decoding step of `batch` sequences with `kv_tokens` tokens of KV together."""
        return self.base_ms + batch * self.row_ms + kv_tokens * self.kv_ms


UNKNOWN_COST = StepCost(1.0, 1.0, 1e-4, 0.1, 1e-5, chunk_tokens=512)
"""Where nothing was measured: right in its proportions at best. Equal for everybody, so comparisons still count tokens."""
