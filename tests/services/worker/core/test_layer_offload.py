"""Laws of prompts whose layers leave while they are computed: the tokens stay the same, and every page comes back."""

import random

import pytest

from services.worker.core.actions import FetchBlocks
from services.worker.core.prefix import Keep
from tests.support.fake_engine import answer
from tests.support.tiered import BLOCK_TOKENS, LAYERS, Tiered


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def busy(seed: int = 0, **more: object) -> tuple[Tiered, list[int]]:
    """A pool of eleven blocks of which an answer being drawn has five: a prompt of eight needs its layers to leave."""
    rig = Tiered(random.Random(seed), **{"pages": 66, **more})  # type: ignore[arg-type]  # a test's keywords
    rig.submit("old", prompt(rig.rng, 17), 16)
    while not rig.target.sequences["old"].generated_tokens:  # type: ignore[index]
        rig.turn()
    return rig, prompt(rig.rng, 30)


@pytest.mark.parametrize("retained", range(LAYERS + 1))
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_same_whatever_number_of_layers_stays(retained: int, seed: int) -> None:
    rig, tokens = busy(seed, retained=retained)
    rig.submit("new", tokens, 9)
    rig.run()
    assert rig.finished["new"] == answer(tokens, 9)
    assert (rig.target.offload.prompts_total > 0) == (retained <= 1)  # with more, the pages are too few as well
    rig.settled()


def test_the_first_token_comes_before_there_is_room_for_all_layers() -> None:
    rig, tokens = busy()
    rig.submit("new", tokens, 9)
    sequence = rig.target.sequences["new"]  # type: ignore[index]  # it started at once
    while not sequence.generated_tokens:
        assert rig.turn()
    assert "old" in rig.target.sequences and rig.target.n_waiting == 1
    rig.run()
    rig.settled()


def test_without_the_rule_a_prompt_waits_until_all_of_it_fits() -> None:
    rig, tokens = busy(retained=None)
    rig.submit("new", tokens, 9)
    assert "new" not in rig.target.sequences
    rig.run()
    rig.settled()


def test_only_the_layers_that_left_are_fetched() -> None:
    rig, tokens = busy(retained=1)
    rig.submit("new", tokens, 9)
    fetched = []
    while rig.turn():
        fetched += [one for one in rig.copies if isinstance(one, FetchBlocks) and one not in fetched]
    assert [one.layers for one in fetched] == [(0, 1, 2, 3, 4)]
    assert fetched[0].own_pages.shape == (len(tokens) // BLOCK_TOKENS, LAYERS - 1)
    rig.settled()


def test_the_prompt_is_computed_in_one_step() -> None:
    rig, tokens = busy()
    rig.submit("new", tokens, 9)
    segments = []
    while not segments:
        assert rig.turn()
        if rig.plan is not None:
            segments = [one for one in rig.plan.segments if one.request == "new"]
    assert segments[0].count == len(tokens) and segments[0].sample
    rig.run()
    rig.settled()


def test_a_failed_copy_costs_a_recomputation_and_no_token() -> None:
    rig, tokens = busy(flaky=1.0)
    rig.submit("new", tokens, 9)
    rig.run()
    assert rig.finished["new"] == answer(tokens, 9) and rig.parking.parked_total == 0
    rig.settled()


def test_blocks_are_published_only_when_they_are_whole() -> None:
    rig, tokens = busy(keep=Keep.ALL, seed=3)
    rig.submit("new", tokens, 9)
    sequence = rig.target.sequences["new"]  # type: ignore[index]
    while not sequence.generated_tokens:
        rig.turn()
    assert rig.pool.match(sequence.hashes) == 0
    rig.run()
    assert rig.pool.match(sequence.hashes) == (len(tokens) + 8) // BLOCK_TOKENS
    rig.settled()


def test_a_prompt_without_scratch_for_so_large_a_step_waits_until_all_of_it_fits() -> None:
    rig, tokens = busy(most_rows=16)
    rig.submit("new", tokens, 9)
    rig.drop("old")  # nothing else happens that would ask again
    rig.run()
    assert rig.finished["new"] == answer(tokens, 9) and rig.target.offload.layers_total == 0
    rig.settled()


@pytest.mark.parametrize("after", range(0, 60, 3))
@pytest.mark.parametrize("retained", [0, 1])
def test_a_cancel_in_any_phase_leaves_nothing_behind(after: int, retained: int) -> None:
    rig, tokens = busy(after, retained=retained, keep=Keep.ALL)
    rig.submit("new", tokens, 9)
    for _ in range(after):
        rig.turn()
    rig.drop("new")
    rig.run()
    assert "new" not in rig.finished or after > 30
    rig.settled()


@pytest.mark.parametrize("seed", range(60))
def test_all_work_ends_with_the_right_tokens(seed: int) -> None:
    rng = random.Random(seed)
    pages = rng.choice([48, 54, 60, 90])
    rig = Tiered(
        rng,
        pages=pages,
        host_pages=rng.choice([0, 30, 90, 400]),
        retained=rng.choice([0, 0, 1, 2, 3]),
        keep=rng.choice(list(Keep)),
        flaky=rng.choice([0.0, 0.0, 0.2]),
        most_rows=rng.choice([10, 20, 100, 100]),
    )
    prefix, prompts = prompt(rng, 11), dict[str, tuple[list[int], int]]()
    for number in range(12):
        tokens, most = prompt(rng, rng.randrange(1, 26)), rng.randrange(1, 10)
        tokens = [*prefix, *tokens][: 30 - most] if rng.random() < 0.5 else tokens[: 30 - most]
        prompts[f"r{number}"] = tokens, most
        rig.submit(f"r{number}", tokens, most)
        for _ in range(rng.randrange(0, 30)):
            rig.turn()
        if rng.random() < 0.15:
            gone = rng.choice(list(prompts))
            if gone not in rig.finished:
                del prompts[gone]
                rig.drop(gone)
    rig.run()
    assert rig.finished == {name: answer(tokens, most) for name, (tokens, most) in prompts.items()}
    rig.settled()
