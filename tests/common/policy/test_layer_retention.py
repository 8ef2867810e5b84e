"""How many layers stay, and which leave: against trying every number, and against counting."""

import random
from fractions import Fraction
from math import ceil

import pytest

from common.policy.layer_retention import offloaded, retained_layers

GIB_PER_S = 2.0**30


def smallest_that_hides(layers: int, prefill_ms: float, layer_bytes: int, bytes_per_s: float) -> int:
    def hides(kept: int) -> bool:
        return (layers - kept) * layer_bytes * 1000 <= Fraction(prefill_ms) * Fraction(bytes_per_s)

    return next(kept for kept in range(layers + 1) if hides(kept))


def test_as_few_layers_stay_as_trying_every_number_finds() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        layers, layer_bytes = draw.randrange(81), draw.randrange(1, 2**26)
        prefill_ms, bytes_per_s = draw.uniform(0.0, 900.0), 10 ** draw.uniform(3.0, 11.0)
        expected = smallest_that_hides(layers, prefill_ms, layer_bytes, bytes_per_s)
        assert retained_layers(layers, prefill_ms, layer_bytes, bytes_per_s) == expected


@pytest.mark.parametrize("leave", range(9))
def test_a_copy_that_takes_exactly_as_long_as_the_prompt_is_hidden(leave: int) -> None:
    assert retained_layers(8, 100.0 * leave, 100_000, 1_000_000.0) == 8 - leave


def test_all_stay_where_the_link_is_not_known_or_moves_nothing_and_none_where_it_is_fast() -> None:
    assert retained_layers(32, 500.0, 2**20, None) == retained_layers(32, 500.0, 2**20, 0.0) == 32
    assert retained_layers(32, 0.0, 2**20, GIB_PER_S) == 32
    assert retained_layers(32, 500.0, 2**20, 1e300) == 0


def test_llama_2_7b_on_an_l20_keeps_what_the_paper_s_formula_gives() -> None:
    tokens = 4096
    prefill_ms = 2 * 6.74e9 * tokens / 72e12 * 1e3
    assert retained_layers(32, prefill_ms, tokens * 16_384, 1e9) == 21  # 11.4 of 32 layers hide at 1 GB/s
    assert retained_layers(32, prefill_ms, tokens * 16_384, 5e9) == 0


@pytest.mark.parametrize(
    "arguments",
    [(-1, 1.0, 1, 1.0), (8, 1.0, 0, 1.0), (8, -1.0, 1, 1.0), (8, float("nan"), 1, 1.0), (8, 1.0, 1, -1.0)],
)
def test_what_is_no_amount_is_refused(arguments: tuple[int, float, int, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        retained_layers(*arguments)


def test_every_other_layer_leaves_when_half_do_from_the_first_on() -> None:
    assert offloaded(8, 4) == (0, 2, 4, 6)
    assert offloaded(8, 0) == ()
    assert offloaded(8, 8) == tuple(range(8))


@pytest.mark.parametrize("layers", [1, 2, 7, 8, 24, 32, 80])
def test_so_many_layers_leave_evenly_spread_and_each_as_early_as_that_allows(layers: int) -> None:
    for leave in range(layers + 1):
        chosen = offloaded(layers, leave)
        assert len(set(chosen)) == leave
        for first in range(layers + 1):  # of the first layers their share leaves, rounded up
            assert sum(layer < first for layer in chosen) == ceil(Fraction(first * leave, layers))


def test_more_layers_than_there_are_cannot_leave() -> None:
    for leave in (-1, 9):
        with pytest.raises(ValueError, match="0 to 8"):
            offloaded(8, leave)
