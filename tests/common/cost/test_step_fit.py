"""Laws of the learning cost model. Steps are made up from known numbers, with seeded noise; nothing is timed."""

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.cost.step_fit import Misses, StepFit, StepWork, TimedStep, prefill_work

TRUE = StepCost(2.0, 0.05, 2e-5, 0.3, 4e-4, chunk_tokens=512)
SLOW = StepCost(6.0, 0.15, 6e-5, 0.9, 12e-4, chunk_tokens=512)
PROMPTS = [(64, 0), (512, 0), (1500, 0), (1500, 1000), (3000, 64)]
BATCHES = [(1, 100), (4, 1000), (16, 8000), (32, 40_000)]


def mixed(rng: random.Random, n_steps: int) -> Iterator[StepWork]:
    """Steps as a worker of both phases has them: prompts alone, decoding alone, both."""
    for _ in range(n_steps):
        count = rng.choice([0, 16, 100, 300, 512])
        rows = rng.randrange(0 if count else 1, 33)
        prompt = prefill_work(rng.choice([0, 64, 500, 1500]), count)
        yield StepWork(prompt.new_tokens, prompt.pairs, rows, rows * rng.randrange(10, 2000))


def decoding(rng: random.Random, n_steps: int) -> Iterator[StepWork]:
    for _ in range(n_steps):
        rows = rng.randrange(1, 33)
        yield StepWork(rows=rows, kv_tokens=rows * rng.randrange(10, 2000))


def off(cost: StepCost | None, true: StepCost) -> float:
    """The largest share by which a prediction is off."""
    assert cost is not None
    execs = [cost.exec_ms(*prompt) / true.exec_ms(*prompt) for prompt in PROMPTS]
    steps = [cost.step_ms(*batch) / true.step_ms(*batch) for batch in BATCHES]
    return max(abs(ratio - 1.0) for ratio in (*execs, *steps))


def numbers(cost: StepCost | None) -> tuple[float, ...]:
    assert cost is not None
    return cost.base_ms, cost.token_ms, cost.pair_ms, cost.row_ms, cost.kv_ms


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_that_made_the_steps_are_found(seed: int) -> None:
    fit = StepFit(512)
    for work in mixed(random.Random(seed), 608):
        fit.learn(work, work.predict_ms(TRUE))
    assert numbers(fit.cost) == pytest.approx(numbers(TRUE), rel=0.03)
    assert fit.cost is not None and (fit.cost.n_samples, fit.cost.chunk_tokens) == (608, 512)


@pytest.mark.parametrize("seed", range(5))
def test_fifty_steps_of_all_kinds_are_enough_even_if_the_prior_is_wrong_tenfold(seed: int) -> None:
    wrong = (StepCost(0.2, 0.5, 2e-6, 3.0, 4e-5, chunk_tokens=512), StepCost(20.0, 5e-3, 2e-4, 0.03, 4e-3, 512))
    for prior in (None, *wrong):
        fit = StepFit(512, prior)
        for work in mixed(random.Random(seed), 50):
            fit.learn(work, work.predict_ms(TRUE))
        assert off(fit.cost, TRUE) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_without_noise_thirty_two_steps_tell_all_numbers(seed: int) -> None:
    fit = StepFit(512)
    for work in mixed(random.Random(seed), 32):
        fit.learn(work, work.predict_ms(TRUE))
    assert off(fit.cost, TRUE) < 0.02


def test_noise_in_steps_too_short_to_show_it_does_not_decide_about_long_prompts() -> None:
    rng = random.Random(7)
    fit = StepFit(512, TRUE)
    for _ in range(200):
        work = prefill_work(0, rng.randrange(2, 60))
        fit.learn(work, work.predict_ms(TRUE) * math.exp(rng.gauss(0.0, 0.1)))
    assert off(fit.cost, TRUE) < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_were_disturbed_tenfold_hardly_move_it(seed: int) -> None:
    rng = random.Random(seed)
    calm, disturbed = StepFit(512), StepFit(512)
    for work in mixed(rng, 600):
        ms = work.predict_ms(TRUE) * math.exp(rng.gauss(0.0, 0.05))
        calm.learn(work, ms)
        disturbed.learn(work, ms * (10.0 if rng.random() < 0.1 else 1.0))
    assert off(calm.cost, TRUE) < 0.1
    assert off(disturbed.cost, TRUE) < 0.15


def test_one_absurd_step_among_many_of_its_kind_changes_nothing_to_speak_of() -> None:
    fit = StepFit(512)
    steps = list(decoding(random.Random(1), 300))
    for work in steps:
        fit.learn(work, work.predict_ms(TRUE))
    for work in steps[:16]:  # long enough to be fitted
        fit.learn(work, work.predict_ms(TRUE) * (1000.0 if work is steps[0] else 1.0))
    assert fit.cost is not None
    assert fit.cost.step_ms(16, 8000) == pytest.approx(TRUE.step_ms(16, 8000), rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_changed_is_followed(seed: int) -> None:
    rng = random.Random(seed)
    fit = StepFit(512)
    for work in mixed(rng, 1500):
        fit.learn(work, work.predict_ms(TRUE))
    for work in mixed(rng, 1500):
        fit.learn(work, work.predict_ms(SLOW))
    assert off(fit.cost, SLOW) < 0.1


def test_what_was_learned_of_prompts_survives_a_long_run_of_decoding() -> None:
    rng = random.Random(3)
    fit = StepFit(512)
    for work in (*mixed(rng, 300), *decoding(rng, 5000)):
        fit.learn(work, work.predict_ms(TRUE))
    assert off(fit.cost, TRUE) < 0.05


@pytest.mark.parametrize("kind", [StepWork(rows=4, kv_tokens=800), prefill_work(0, 128)])
def test_five_steps_of_one_kind_are_enough_to_predict_that_kind(kind: StepWork) -> None:
    fit = StepFit(512)
    for share in (4.0, 1.02, 0.98, 1.01, 0.99):  # the first one warms up
        fit.learn(kind, 7.0 * share)
    assert fit.cost is not None
    assert kind.predict_ms(fit.cost) == pytest.approx(7.0, rel=0.1)


def test_what_was_never_seen_keeps_the_proportions_of_the_prior() -> None:
    fit = StepFit(512, SLOW)
    for work in decoding(random.Random(4), 200):
        fit.learn(work, work.predict_ms(TRUE))  # a third of SLOW in every term
    assert off(fit.cost, TRUE) < 0.05


def test_nothing_is_said_before_the_first_step_unless_there_is_a_prior() -> None:
    assert StepFit(512).cost is None
    said = StepFit(256, SLOW).cost
    assert said is not None and numbers(said) == numbers(SLOW)
    assert (said.n_samples, said.chunk_tokens) == (0, 256)


def test_recalled_steps_are_known_before_the_first_own_one_and_are_no_predictions() -> None:
    fit = StepFit(512)
    fit.recall([TimedStep(work, work.predict_ms(TRUE)) for work in mixed(random.Random(5), 200)])
    assert off(fit.cost, TRUE) < 0.05
    assert fit.prefill_misses.median is None and fit.decode_misses.median is None


def test_a_prediction_is_judged_before_its_step_is_learned() -> None:
    fit = StepFit(512, TRUE)
    fit.learn(StepWork(rows=1), 2.3 * 2)
    assert fit.decode_misses.median == pytest.approx(0.5)
    assert fit.prefill_misses.median is None
    work = prefill_work(0, 100)
    predicted_ms = work.predict_ms(fit.cost or UNKNOWN_COST)
    fit.learn(work, predicted_ms / 2)
    assert fit.prefill_misses.median == pytest.approx(1.0)


def test_errors_of_long_ago_do_not_count() -> None:
    misses = Misses()
    for real_ms in [1.0] * 500 + [10.0] * 60:
        misses.add(9.0, real_ms)
    assert misses.median == pytest.approx(0.1)


ODD_MS = st.floats() | st.sampled_from([0.0, -1.0, 1e-300, 1e300, math.inf, math.nan, 3.0])
ODD_SIZES = st.integers(-5, 10**16) | st.integers(0, 600)
ODD_WORK = st.builds(StepWork, ODD_SIZES, st.floats() | st.floats(0.0, 1e6), ODD_SIZES, ODD_SIZES)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ODD_WORK, ODD_MS), max_size=60))
def test_whatever_is_observed_the_numbers_are_finite_and_not_negative(steps: list[tuple[StepWork, float]]) -> None:
    fit = StepFit(512)
    for work, ms in steps:
        fit.learn(work, ms)
        if fit.cost is not None:
            assert all(math.isfinite(number) and number >= 0.0 for number in numbers(fit.cost))
    for misses in (fit.prefill_misses, fit.decode_misses):
        assert misses.median is None or math.isfinite(misses.median)


def test_a_number_that_the_prior_takes_for_nothing_is_found_all_the_same() -> None:
    fit = StepFit(512, StepCost(2.0, 0.05, 0.0, 0.0, 0.0, chunk_tokens=512))
    for work in mixed(random.Random(8), 96):
        fit.learn(work, work.predict_ms(TRUE))
    assert off(fit.cost, TRUE) < 0.02


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0, 0.0])
def test_a_prior_that_says_nothing_usable_is_that_of_an_unknown_engine(broken: float) -> None:
    fit = StepFit(512, StepCost(broken, 0.0, 0.0, 0.0, 0.0, chunk_tokens=1))
    assert numbers(fit.cost) == numbers(UNKNOWN_COST)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 5000))
def test_fitted_exec_grows_with_the_prompt_and_falls_with_what_is_cached(
    seed: int, prompt: int, more: int, cached: int
) -> None:
    rng = random.Random(seed)
    fit = StepFit(512)
    for work in mixed(rng, 40):
        fit.learn(work, rng.uniform(0.1, 50.0))  # no law at all
    assert fit.cost is not None
    exec_ms, enough = fit.cost.exec_ms, 1 + 1e-9
    assert exec_ms(prompt, cached) <= exec_ms(prompt + more, cached) * enough
    assert exec_ms(prompt, cached) * enough >= exec_ms(prompt, cached + more)


def test_the_same_steps_give_the_same_numbers() -> None:
    first, second = StepFit(512), StepFit(512)
    for fit in (first, second):
        for work in mixed(random.Random(6), 200):
            fit.learn(work, work.predict_ms(TRUE))
    assert first.cost == second.cost
