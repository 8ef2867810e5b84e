"""What stands in a sequence already counts as said."""

import pytest
import torch

from common.messages.requests import Sampling
from services.worker.engine.penalties import penalise_into

VOCAB_TOKENS = 50
PROMPT = [3, 4, 5]


def test_repetition_penalty_weakens_prompt_and_output_once_each() -> None:
    row = torch.linspace(-2.0, 2.0, VOCAB_TOKENS)
    meant = row.clone()
    meant[[0, 1]] *= 2.0
    meant[49] /= 2.0
    penalise_into(row, [0, 1, 1, 49, 49], 3, Sampling(max_tokens=1, repetition_penalty=2.0))
    assert torch.allclose(row, meant)


def test_frequency_and_presence_penalties_count_output_only() -> None:
    row = torch.zeros(VOCAB_TOKENS)
    asked = Sampling(max_tokens=1, frequency_penalty=0.5, presence_penalty=0.25)
    penalise_into(row, [*PROMPT, 7, 7, 8], 3, asked)
    assert row[7] == -1.25
    assert row[8] == -0.75
    assert not row[PROMPT].any()


def test_repetition_comes_before_frequency_and_presence() -> None:
    row = torch.full((VOCAB_TOKENS,), 4.0)
    asked = Sampling(max_tokens=1, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalise_into(row, [*PROMPT, 7, 7], 3, asked)
    assert row[7] == 4.0 / 2.0 - 1.25
    assert row[3] == 2.0


@pytest.mark.parametrize(("given", "acts_as"), [(1e-300, 0.01), (1e300, 100.0)])
def test_a_repetition_penalty_out_of_bounds_acts_as_the_bound(given: float, acts_as: float) -> None:
    row, meant = torch.linspace(-2.0, 2.0, VOCAB_TOKENS), torch.linspace(-2.0, 2.0, VOCAB_TOKENS)
    penalise_into(row, [0, 49], 1, Sampling(max_tokens=1, repetition_penalty=given))
    penalise_into(meant, [0, 49], 1, Sampling(max_tokens=1, repetition_penalty=acts_as))
    assert torch.equal(row, meant)
    assert torch.isfinite(row).all()
