"""What a token may be, and that it depends on the row, the settings and (seed, t) alone."""

import math
from dataclasses import replace
from typing import Any  # Any: settings by name

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment
from services.worker.engine.chance import uniform
from services.worker.engine.sampling import sample

VOCAB_TOKENS = 50
PROMPT = [3, 4, 5]


def segment(name: str = "r0", generated: tuple[int, ...] = (), **wishes: object) -> Segment:
    tokens = [*PROMPT, *generated]
    return Segment(
        request=RequestId(name),
        tokens=tokens,
        prompt_tokens=len(PROMPT),
        start=len(tokens) - 1,
        count=1,
        table=PageTable(1),
        sampling=Sampling(max_tokens=99, **wishes),  # type: ignore[arg-type]  # a test's keywords
        sample=True,
    )


def logits_of(rows: int = 1, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB_TOKENS, generator=torch.Generator().manual_seed(seed)) * spread


def tokens_of(logits: Tensor, count: int = 300, **wishes: object) -> set[int]:
    drawn = [segment(f"r{seed}", seed=seed, temperature=1.0, **wishes) for seed in range(count)]
    return {one.token for one in sample(drawn, logits.expand(count, -1))}


def test_greedy_takes_the_likeliest_of_each_row() -> None:
    logits = logits_of(3)
    found = [one.token for one in sample([segment("a"), segment("b"), segment("c")], logits)]
    assert found == logits.argmax(dim=-1).tolist()


def test_the_token_does_not_depend_on_the_other_rows() -> None:
    logits = logits_of(4)
    batch = [segment(f"r{row}", temperature=0.8, seed=row) for row in range(4)]
    together = [one.token for one in sample(batch, logits)]
    alone = [sample([batch[row]], logits[row : row + 1])[0].token for row in range(4)]
    assert together == alone


def test_the_random_number_depends_on_seed_and_position_alone() -> None:
    numbers = {(seed, position): uniform(seed, position) for seed in (-1, 0, 1, 2**63) for position in range(50)}
    assert len(set(numbers.values())) == len(numbers)
    assert all(0.0 <= number < 1.0 for number in numbers.values())
    assert uniform(7, 3) == uniform(7, 3)


def test_the_random_number_does_not_depend_on_the_length_of_the_prompt() -> None:
    logits = logits_of(spread=0.1)
    short = segment(generated=(7, 8), temperature=1.0, seed=5)
    longer = Segment(
        request=RequestId("r1"),
        tokens=[*PROMPT, *PROMPT, 7, 8],
        prompt_tokens=2 * len(PROMPT),
        start=2 * len(PROMPT) + 1,
        count=1,
        table=PageTable(1),
        sampling=short.sampling,
        sample=True,
    )
    assert sample([short], logits)[0].token == sample([longer], logits)[0].token


def test_random_numbers_are_spread_evenly() -> None:
    numbers = np.array([[uniform(seed, position) for position in range(40)] for seed in range(100)])
    counts, _ = np.histogram(numbers, bins=10, range=(0.0, 1.0))
    assert counts.min() > 330
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.3


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of(spread=1.0)
    cold = [
        one.token for one in sample([segment(temperature=0.01, seed=seed) for seed in range(50)], logits.expand(50, -1))
    ]
    assert set(cold) == {int(logits.argmax())}
    assert len(tokens_of(logits)) > 20


def test_top_k_keeps_k_tokens() -> None:
    logits = logits_of(spread=1.0)
    assert tokens_of(logits, top_k=4) == set(logits[0].topk(4).indices.tolist())


def test_top_k_breaks_ties_by_token_id() -> None:
    assert tokens_of(torch.zeros(1, VOCAB_TOKENS), top_k=3) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert tokens_of(logits, top_p=0.69) == {1, 2}
    assert tokens_of(logits, top_p=0.71) == {1, 2, 3}
    assert tokens_of(logits, top_p=0.0) == {1}


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert tokens_of(logits, top_k=2, top_p=0.55) == {1}


def test_min_p_keeps_tokens_not_too_far_below_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert tokens_of(logits, min_p=0.45) == {1, 2, 3}
    assert tokens_of(logits, min_p=1.0) == {1}


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = logits_of(2)
    found = [one.token for one in sample([segment("a", temperature=1e-308), segment("b", temperature=9e-6)], logits)]
    assert found == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_drawn_and_an_infinite_logit_always(temperature: float) -> None:
    logits = torch.zeros(3, VOCAB_TOKENS)
    logits[0, :40] = torch.nan
    logits[1, [7, 9]] = torch.inf
    logits[2] = -torch.inf
    for seed in range(20):
        batch = [segment(f"r{row}", temperature=temperature, seed=seed, logprobs=2) for row in range(3)]
        tokens = [one.token for one in sample(batch, logits)]
        assert tokens[0] >= 40
        assert tokens[1] in (7, 9)
        assert tokens[2] == 0


_LOGIT = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, -1.0, 3.4028235e38, -3.4028235e38, -math.inf]),
)
_ASKED = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.sampled_from([0.0, 5e-324, 1e-308, 1e-5, 2.0]), st.floats(0.0, 2.0)),
        "top_k": st.one_of(st.none(), st.integers(1, 2**63)),
        "top_p": st.floats(0.0, 1.0, exclude_min=True),
        "min_p": st.floats(0.0, 1.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.one_of(st.sampled_from([5e-324, 0.01, 100.0, 1e300]), st.floats(0.01, 100.0)),
        "seed": st.integers(0, 2**63 - 1),
        "logprobs": st.sampled_from([None, 0, 20]),
    }
)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(_LOGIT, min_size=1, max_size=40),
    asked=_ASKED,
    seen=st.lists(st.integers(0, 39), min_size=1, max_size=20),
    others=st.integers(0, 2),
)
def test_whatever_the_logits_and_settings_a_possible_token_comes_out(
    row: list[float], asked: dict[str, Any], seen: list[int], others: int
) -> None:
    one = segment(**asked)
    history = [token % len(row) for token in seen]
    one = replace(one, tokens=history, prompt_tokens=len(history) // 2, start=len(history) - 1)
    logits = torch.tensor([row] * (1 + others), dtype=torch.float32)
    sampled = sample([one] * (1 + others), logits)
    assert len({each.token for each in sampled}) == 1
    token = sampled[0].token
    assert 0 <= token < len(row)
    possible = [index for index, logit in enumerate(row) if not math.isnan(logit) and logit != -math.inf]
    # A penalty may push the last possible tokens to -inf; then all are equally impossible, and 0 stands for them.
    assert token in possible or token == 0


def test_penalties_change_the_greedy_token_of_each_row_alone() -> None:
    logits = torch.zeros(2, VOCAB_TOKENS)
    logits[:, 9], logits[:, 10] = 2.0, 1.5
    batch = [segment("a", generated=(9,), presence_penalty=1.0), segment("b", generated=(9,))]
    assert [one.token for one in sample(batch, logits)] == [10, 9]


def test_greedy_penalised_and_drawn_rows_of_one_batch_keep_their_places() -> None:
    logits = logits_of(5)
    batch = [
        segment("a", temperature=0.8, seed=1),
        segment("b"),
        segment("c", generated=(9,), presence_penalty=1.0),
        segment("d", temperature=1.0, seed=2, top_k=3),
        segment("e", generated=(9,), temperature=1.0, seed=3, frequency_penalty=1.0),
    ]
    together = [one.token for one in sample(batch, logits)]
    assert together == [sample([batch[row]], logits[row : row + 1])[0].token for row in range(5)]


def test_penalties_change_the_greedy_token() -> None:
    logits = torch.zeros(1, VOCAB_TOKENS)
    logits[0, 9], logits[0, 10] = 2.0, 1.5
    assert sample([segment(generated=(9,))], logits)[0].token == 9
    assert sample([segment(generated=(9,), presence_penalty=1.0)], logits)[0].token == 10
    assert sample([segment(generated=(9,), repetition_penalty=2.0)], logits)[0].token == 10


def test_logprobs_are_natural_and_of_the_untouched_logits() -> None:
    logits = logits_of()
    meant = torch.log_softmax(logits[0], dim=-1)
    one = sample([segment(generated=(9,), temperature=2.0, top_k=1, presence_penalty=2.0, logprobs=3)], logits)[0]
    assert one.logprob is not None
    assert one.logprob.token == one.token
    assert one.logprob.logprob == pytest.approx(float(meant[one.token]), abs=1e-6)
    assert [token for token, _ in one.logprob.top] == meant.topk(3).indices.tolist()
    assert sample([segment(logprobs=0)], logits)[0].logprob.top == ()  # type: ignore[union-attr]  # it is asked for
    assert sample([segment()], logits)[0].logprob is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_do_not_see_the_penalties(temperature: float) -> None:
    logits = logits_of()
    best = int(logits.argmax())
    one = sample([segment(generated=(best,), temperature=temperature, presence_penalty=2.0, logprobs=1)], logits)[0]
    assert one.logprob is not None
    assert one.logprob.top[0][1] == pytest.approx(float(torch.log_softmax(logits[0], dim=-1)[best]), abs=1e-6)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = logits_of()
    before = logits.clone()
    sample([segment(generated=(9,), temperature=0.7, top_p=0.9, repetition_penalty=1.3, logprobs=2)], logits)
    assert torch.equal(logits, before)
