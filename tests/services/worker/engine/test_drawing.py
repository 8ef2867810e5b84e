"""Draws against the plain way: sort everything, cut, add up."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.messages.requests import Sampling
from services.worker.engine.drawing import draw_rows

CHANCES = [(i + 0.5) / 300 for i in range(300)]


def plainly_drawn(logits: Tensor, asked: Sampling, chance: float) -> int:
    scores = (logits.double().numpy() - float(logits.max())) / asked.temperature
    ids = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[ids])
    kept = int(np.count_nonzero(weights >= asked.min_p))
    kept = min(kept, asked.top_k or kept)
    weights = weights[:kept]
    if asked.top_p < 1.0:
        weights = weights[: int(np.searchsorted(np.cumsum(weights), asked.top_p * weights.sum())) + 1]
    return int(ids[int(np.searchsorted(np.cumsum(weights), chance * weights.sum(), side="right"))])


def drawn(logits: Tensor, asked: Sampling, chances: list[float]) -> list[int]:
    return draw_rows(logits.expand(len(chances), -1), [asked] * len(chances), chances)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    chances = [(i + 0.5) / 1000 for i in range(1000)]
    tokens = drawn(logits, Sampling(max_tokens=1, temperature=1.0), chances)
    assert [tokens.count(token) for token in range(4)] == [500, 250, 125, 125]


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0, 40.0])
@pytest.mark.parametrize(
    "cuts",
    [{}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 30}, {"top_k": 4, "top_p": 0.5}, {"top_k": 9, "min_p": 0.3}],
)
def test_buckets_draw_what_sorting_everything_draws(cuts: dict[str, float], spread: float) -> None:
    # A sixteenth is exact, so that there are ties and no sum depends on how weights were rounded.
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * spread
    logits = torch.round(noise * 16) / 16
    asked = Sampling(max_tokens=1, temperature=0.5, **cuts)  # type: ignore[arg-type]  # a test's keywords
    meant = [plainly_drawn(logits, asked, chance) for chance in CHANCES]
    found = drawn(logits, asked, CHANCES)
    assert sum(a != b for a, b in zip(found, meant, strict=True)) <= 1  # float32 weights may move one border


def test_no_chance_leads_out_of_the_support() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(4))
    last = [1.0 - 2.0**-53] * 5
    for kept in range(1, 500, 7):
        support = set(torch.sort(logits, descending=True, stable=True).indices[:kept].tolist())
        for top_p in (0.3, 0.999999, 1.0):
            asked = Sampling(max_tokens=1, temperature=0.7, top_k=kept, top_p=top_p)
            assert set(drawn(logits, asked, last)) <= support


def test_tokens_without_any_probability_are_never_drawn() -> None:
    logits = torch.full((64,), -torch.inf)
    logits[[5, 60]] = 1.0
    for top_k in (None, 3):
        asked = Sampling(max_tokens=1, temperature=1.0, top_k=top_k)
        assert set(drawn(logits, asked, [0.0, 0.4, 0.6, 1.0 - 2.0**-53])) == {5, 60}


def test_ties_are_drawn_by_rising_id() -> None:
    assert drawn(torch.zeros(8), Sampling(max_tokens=1, temperature=1.0), [i / 8 for i in range(8)]) == list(range(8))


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
def test_the_size_of_the_batch_changes_no_draw(rows: int) -> None:
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(5))
    chances = [(i + 0.5) / 64 for i in range(64)]
    asked = [Sampling(max_tokens=1, temperature=1.0)] * 64
    together = draw_rows(logits, asked, chances)
    assert draw_rows(logits[:rows], asked[:rows], chances[:rows]) == together[:rows]
