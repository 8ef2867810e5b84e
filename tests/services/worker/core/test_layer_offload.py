"""Laws of prompts whose layers leave while they are computed: the tokens stay the same, and every page comes back."""

import random

import numpy as np
import pytest

from common.block_hash import hash_blocks
from common.ids import PeerId, RequestId
from common.messages.requests import Sampling
from services.worker.core.actions import FetchBlocks
from services.worker.core.found import FoundBlocks
from services.worker.core.prefix import Keep
from services.worker.core.sequence import NewPrompt
from tests.support.fake_engine import answer
from tests.support.tiered import BLOCK_TOKENS, LAYERS, ROOT, Tiered


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


def test_a_prompt_that_is_called_off_is_not_counted_as_computed_so() -> None:
    rig, tokens = busy(most_rows=16)
    rig.submit("new", tokens, 9)
    rig.run()
    assert rig.restoring.counters()["layerwise_prompts_total"] == 0.0


def test_a_prompt_whose_copies_fail_is_counted_as_a_failure() -> None:
    rig, tokens = busy(flaky=1.0)
    rig.submit("new", tokens, 9)
    rig.run()
    counters = rig.restoring.counters()
    assert counters["parking_failures_total"] == 1.0 and counters["layerwise_prompts_total"] == 1.0


def test_nothing_is_copied_of_a_prompt_whose_first_token_is_its_last() -> None:
    rig, tokens = busy(host_pages=50)  # room for this one, and not for parking another
    rig.submit("new", tokens, 1)
    rig.run()
    assert rig.finished["new"] == answer(tokens, 1)
    assert (
        rig.parking.parked_total == 0 and rig.parking.stored_bytes_total == 0 and rig.target.offload.prompts_total == 1
    )
    rig.settled()


def test_nothing_is_parked_of_a_prompt_that_its_first_token_stops() -> None:
    rig, tokens = busy()
    stops = tuple(answer(tokens, 1))
    rig.queued.append(
        NewPrompt(
            request=RequestId("new"),
            tokens=tuple(tokens),
            sampling=Sampling(max_tokens=9, stop_token_ids=stops),
            root=ROOT,
        )
    )
    rig.run()
    assert rig.finished["new"] == list(stops)
    assert rig.target.offload.prompts_total == 1 and rig.parking.parked_total == 0
    rig.settled()


def test_a_prompt_of_which_more_was_found_elsewhere_has_no_room_without_all_layers() -> None:
    rig, tokens = busy()
    assert rig.target.has_room(len(tokens)) and not rig.target.has_room(len(tokens), loads=True)


def test_cached_blocks_that_nobody_pins_need_room_too() -> None:
    """Who is told that there is room starts at once, however its blocks are cached."""
    told = 0
    for seed in range(30):
        rng = random.Random(seed)
        rig, tokens = busy(seed, keep=Keep.ALL, retained=rng.choice([0, 1, 2]), pages=rng.choice([54, 60, 66, 72]))
        head = tokens[: rng.randrange(4, 30)]
        rig.submit("before", head, 1)
        for _ in range(rng.randrange(60)):
            rig.turn()
        names = hash_blocks(tuple(tokens[:-1]), ROOT, BLOCK_TOKENS)
        hits, pinned = rig.pool.match(names), rig.pool.pinned_run(names)
        if "before" in rig.finished and rig.target.has_room(
            len(tokens), pinned_blocks=pinned, unpinned_blocks=hits - pinned
        ):
            told += 1
            rig.submit("new", tokens, 4)
            assert rig.target.sequences[RequestId("new")].table.n_blocks
        rig.run()
    assert told


def test_what_others_keep_for_a_prompt_that_never_starts_is_given_back() -> None:
    rig, tokens = busy(retained=None)
    pages = np.zeros((3, LAYERS), np.int32)
    found = FoundBlocks(7, PeerId("store"), 0, ("host",) * 3, pages, float("inf"))
    prompt = NewPrompt(
        request=RequestId("new"), tokens=tuple(tokens), sampling=Sampling(max_tokens=2), root=ROOT, found=found
    )
    rig.target.submit(prompt)
    rig.target.drop(RequestId("new"))
    (never,) = rig.target.take_started()
    assert never.load is not None and never.load.found is found and never.load.n_blocks == 0
    rig.run()
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
