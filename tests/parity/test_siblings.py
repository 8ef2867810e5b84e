"""A burst of prompts with one long start: transformers' own tokens, and the start is computed once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.caching import BLOCK, Answers, Rig, rig

pytestmark = pytest.mark.system

SIBLINGS, SHARED, TAIL = 12, 40 * BLOCK, 9
WORKERS = ("prefill-0", "mixed-0")


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    answers = Answers(tiny_model("llama"))
    with rig(tmp_path_factory.mktemp("siblings"), answers, 2, {name: {} for name in WORKERS}) as started:
        yield started


@pytest.mark.parametrize("worker", WORKERS)
def test_a_burst_of_siblings_is_answered_rightly_and_computes_the_shared_start_once(served: Rig, worker: str) -> None:
    shared = served.answers.prompt(SHARED, "shared", worker)
    prompts = [shared + served.answers.prompt(TAIL, "tail", worker, number) for number in range(SIBLINGS)]
    outcomes = served.ask_all(worker, prompts)
    assert sorted(outcome.cached_tokens for outcome in outcomes) == [0, *[SHARED] * (SIBLINGS - 1)]
    assert served.counter(worker, "missed_tokens_total") == SHARED + SIBLINGS * TAIL
    assert served.hits(worker) == {"device": (SIBLINGS - 1) * SHARED}
    computed = served.counter(worker, "computed_tokens_total")
    drawn_here = served.counter(worker, "generated_tokens_total")
    assert computed <= SHARED + SIBLINGS * TAIL + drawn_here
    assert served.counter(worker, "shared_prefix_waits_total") < SIBLINGS
