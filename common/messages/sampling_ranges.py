"""Which numbers a client may choose tokens by, and a worker computes with. Pure: one table for both ends of the wire."""

from collections.abc import Mapping
from types import MappingProxyType

from common.messages.requests import Sampling

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
        "repetition_penalty": (0.01, 100.0),
    }
)
"""Field of Sampling -> its least and its largest value; `top_p` must be above its least one."""
MAX_TOP_LOGPROBS = 20
SEEDS = 2**63


def out_of_range(sampling: Sampling, vocab_tokens: int) -> str:
    """Which number of `sampling` no gateway sends, and what it may be; empty if all are in range.

    The engine computes with them in arrays of fixed widths, for all sequences of a step at once: one number that does
    not fit would end the step of everybody.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:  # nan is in no range
            return f"{name} must be {low:g} to {high:g}, not {value:g}"
    if not sampling.top_p:
        return "top_p must be above 0"
    if sampling.top_k is not None and not 1 <= sampling.top_k <= vocab_tokens:
        return f"top_k must be 1 to {vocab_tokens}, or none, not {sampling.top_k}"
    if sampling.max_tokens < 1:
        return f"max_tokens must be 1 or more, not {sampling.max_tokens}"
    if not 0 <= sampling.seed < SEEDS:
        return f"seed must be 0 to 2**63 - 1, not {sampling.seed}"
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_TOP_LOGPROBS:
        return f"logprobs must be 0 to {MAX_TOP_LOGPROBS}, or none, not {sampling.logprobs}"
    return ""
