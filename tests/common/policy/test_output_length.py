"""What is foretold of an answer's length follows from the lengths of those that ended."""

import random
from math import ceil

import pytest

from common.policy.output_length import LengthPredictor


def test_the_rest_is_the_percentile_of_the_lengths_that_are_still_possible() -> None:
    draw = random.Random(5)
    for _ in range(300):
        lengths, share = [draw.randrange(1, 50) for _ in range(draw.randrange(30))], draw.choice([0.1, 0.5, 0.9, 1.0])
        predictor, generated = LengthPredictor(share), draw.randrange(60)
        for tokens in lengths:
            predictor.learn(tokens)
        longer = sorted(tokens for tokens in lengths if tokens > generated)
        expected = longer[ceil(share * len(longer)) - 1] - generated if longer else 100
        assert predictor.remaining(generated, 100) == expected


def test_an_answer_that_outlives_what_was_foretold_is_foretold_anew() -> None:
    predictor = LengthPredictor(0.5)
    for tokens in (10, 20, 30, 40):
        predictor.learn(tokens)
    assert [predictor.remaining(generated, 77) for generated in (0, 19, 20, 35, 40, 99)] == [20, 11, 10, 5, 77, 77]


def test_no_more_is_foretold_than_the_answer_may_have() -> None:
    predictor = LengthPredictor()
    predictor.learn(40)
    assert [predictor.remaining(generated, 7) for generated in (0, 35, 40)] == [7, 5, 7]


def test_old_lengths_are_forgotten() -> None:
    predictor = LengthPredictor(1.0, remembered=3)
    for tokens in (1000, 7, 7, 7):
        predictor.learn(tokens)
    assert predictor.remaining(0, 9999) == 7


@pytest.mark.parametrize("percentile", [0.0, -0.1, 1.1, float("nan")])
def test_what_is_no_percentile_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        LengthPredictor(percentile)


def test_it_must_remember_something() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        LengthPredictor(remembered=0)
