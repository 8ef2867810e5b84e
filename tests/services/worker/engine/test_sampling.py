"""What a token may be, and that it depends on the row, the settings and (seed, t) alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment
from services.worker.engine import sampling as sampling_module
from services.worker.engine.chance import uniform
from services.worker.engine.sampling import draw, penalised, sample

VOCAB_TOKENS = 50
PROMPT = [3, 4, 5]


def segment(name: str = "r0", generated: tuple[int, ...] = (), **settings: object) -> Segment:
    tokens = [*PROMPT, *generated]
    return Segment(
        request=RequestId(name),
        tokens=tokens,
        prompt_tokens=len(PROMPT),
        start=len(tokens) - 1,
        count=1,
        table=PageTable(1),
        sampling=Sampling(max_tokens=99, **settings),  # type: ignore[arg-type]  # a test's keywords
        sample=True,
    )


def logits_of(rows: int = 1, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB_TOKENS, generator=torch.Generator().manual_seed(seed)) * spread


def tokens_of(logits: Tensor, count: int = 300, **settings: object) -> set[int]:
    drawn = [segment(f"r{seed}", seed=seed, temperature=1.0, **settings) for seed in range(count)]
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


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = [draw(logits, Sampling(max_tokens=1), float(chance)) for chance in grid]
    assert [drawn.count(token) for token in range(4)] == [500, 250, 125, 125]


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


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 30}, {"top_k": 4, "top_p": 0.5}])
def test_sorting_a_part_of_the_vocabulary_draws_the_same_tokens(
    settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.round(logits_of()[0].double().numpy(), 1)  # rounded, so that there are ties
    chances = [(i + 0.5) / 200 for i in range(200)]
    request = Sampling(max_tokens=1, **settings)  # type: ignore[arg-type]  # a test's keywords
    whole = [draw(row, request, chance) for chance in chances]
    monkeypatch.setattr(sampling_module, "_LIKELIEST", (4, 16))
    assert [draw(row, request, chance) for chance in chances] == whole


def test_repetition_penalty_weakens_prompt_and_output_once_each() -> None:
    row = np.linspace(-2.0, 2.0, VOCAB_TOKENS)
    changed = penalised(row, [0, 1, 1, 49, 49], 3, Sampling(max_tokens=1, repetition_penalty=2.0))
    meant = row.copy()
    meant[[0, 1]] *= 2.0
    meant[49] /= 2.0
    assert np.allclose(changed, meant)


def test_frequency_and_presence_penalties_count_output_only() -> None:
    row = np.zeros(VOCAB_TOKENS)
    changed = penalised(
        row, [*PROMPT, 7, 7, 8], 3, Sampling(max_tokens=1, frequency_penalty=0.5, presence_penalty=0.25)
    )
    assert changed[7] == -1.25
    assert changed[8] == -0.75
    assert not changed[PROMPT].any()


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


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = logits_of()
    before = logits.clone()
    sample([segment(generated=(9,), temperature=0.7, top_p=0.9, repetition_penalty=1.3, logprobs=2)], logits)
    assert torch.equal(logits, before)
