"""A client's numbers as workers get them."""

import pytest

from common.messages.sampling_ranges import out_of_range
from gateway.openai_schema import CompletionRequest
from gateway.sampling import Limits, read_sampling

LIMITS = Limits(vocab_tokens=1_000, context_tokens=100, end_tokens=(), default_max_tokens=None)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [(None, None), (-1, None), (0, None), (1, 1), (999, 999), (1_000, None), (3_000_000_000, None), (10**30, None)],
)
def test_a_top_k_that_leaves_no_token_out_means_all(asked: int | None, sent: int | None) -> None:
    sampling = read_sampling(CompletionRequest(model="m", prompt="x", top_k=asked), LIMITS, 5, 1)
    assert sampling.top_k == sent
    assert out_of_range(sampling, LIMITS.vocab_tokens) == ""
