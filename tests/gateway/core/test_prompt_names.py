"""Laws of what is remembered about prompts: names as hashing would give them, computed once, and not too many."""

import random

import pytest

from common.block_hash import hash_blocks, root_hash
from common.ids import PeerId
from gateway.core import expectations, prompt_names
from gateway.core.expectations import Expectations
from gateway.core.prompt_names import PromptNames
from tests.gateway.model import identity

MODEL = identity()


def prompt(n_tokens: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(60) for _ in range(n_tokens))


@pytest.mark.parametrize("n_tokens", [0, 15, 16, 17, 40])
@pytest.mark.parametrize("n_emitted", [0, 1, 8, 30])
@pytest.mark.parametrize("salt", ["", "s"])
def test_names_are_those_of_the_whole_blocks_of_prompt_and_answer(n_tokens: int, n_emitted: int, salt: str) -> None:
    names, tokens, emitted = PromptNames(), prompt(n_tokens), prompt(n_emitted, 1)
    for _ in range(2):
        found = names.of(tokens, emitted, MODEL, salt)
        assert list(found) == hash_blocks(tokens + emitted, root_hash(MODEL, salt), 16)
    assert list(names.of(tokens, (), MODEL, salt)) == hash_blocks(tokens, root_hash(MODEL, salt), 16), "as it was"


def test_one_prompt_is_hashed_once_per_salt_and_model_and_equal_ones_share_nothing_wrong() -> None:
    names, tokens = PromptNames(), prompt(64)
    once = names.of(tokens, (), MODEL, "")
    assert names.of(tokens, (), MODEL, "") is once
    assert names.of((*tokens,), (), MODEL, "") == once
    assert not set(names.of(tokens, (), MODEL, "salt")) & set(once)
    assert not set(names.of(tokens, (), identity(fingerprint="f1"), "")) & set(once)


def test_only_the_latest_prompts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_names, "MOST_NAMES", 15)  # three prompts of four blocks
    names = PromptNames()
    prompts = [prompt(64, seed) for seed in range(50)]
    kept = [names.of(one, (), MODEL, "") for one in prompts]
    assert names.of(prompts[47], (), MODEL, "") is kept[47], "asked for: now the latest"
    names.of(prompt(64, 99), (), MODEL, "")
    assert names.of(prompts[47], (), MODEL, "") is kept[47]
    assert names.of(prompts[49], (), MODEL, "") is kept[49]
    assert names.of(prompts[48], (), MODEL, "") is not kept[48], "the oldest had to go"
    huge = prompt(16 * 100, 7)
    assert names.of(huge, (), MODEL, "") is names.of(huge, (), MODEL, ""), "the latest stays, however long"


def test_what_is_expected_is_bounded_without_waiting_for_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectations, "_MOST_NAMES", 100)
    one = Expectations()
    for n in range(200):
        one.add([f"{PeerId('a')}{n}-{block}".encode() for block in range(10)], 1)
        one.turn(0.0, 60_000.0)
        assert len(one.young) + len(one.old) <= 2 * 100
    assert b"a199-0" in one.young or b"a199-0" in one.old, "the latest are kept"
