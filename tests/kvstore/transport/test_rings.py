"""Layers that share pages, and loads of some layers: the engine is held back exactly as far as it must be."""

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.transport.block_jobs import BlockEvent, FetchJob, LayerFetched, StoreJob
from tests.kvstore.transport.test_block_mover import NEVER_MS, OURS, STORE, THEIRS, Setting, end


@pytest.fixture
def at() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


def job(layers: tuple[int, ...]) -> FetchJob:
    columns = list(range(len(layers)))
    return FetchJob(1, STORE, OURS[:, columns], THEIRS[:, columns], NEVER_MS, by_layer=True, layers=layers)


def allowed(at: Setting, call: int) -> int:
    """The last layer that the gate lets through."""
    return at.gate._layers_there.get(call, 10**6) - 1


def test_layers_that_are_not_fetched_hold_nobody_up(at: Setting) -> None:
    at.clock.halt()
    at.mover.post(job((2, 5)))
    assert allowed(at, 1) == 1
    at.clock.going.set()
    assert at.hear(2) == [LayerFetched(1, 2, True), LayerFetched(1, 5, True)]
    assert end(at.hear(1)[0]) == (1, True)
    assert np.array_equal(at.own.pages.rows[OURS[:, :2].ravel()], at.peer.pages.rows[THEIRS[:, :2].ravel()])


def test_of_some_layers_the_ones_up_to_the_next_that_is_missing_may_be_read() -> None:
    assert [job((0, 3, 7)).readable_layer(n) for n in range(4)] == [-1, 2, 6, 7]
    assert [job((2, 3)).readable_layer(n) for n in range(3)] == [1, 2, 3]


def test_named_layers_must_be_those_of_the_columns_and_rise(at: Setting) -> None:
    with pytest.raises(ValueError, match="must rise"):
        at.mover.post(job((5, 2)))
    with pytest.raises(ValueError, match="for 3 columns"):
        at.mover.post(FetchJob(1, STORE, OURS, THEIRS, NEVER_MS, by_layer=True, layers=(1, 2)))


@pytest.mark.parametrize("there", [True, False])
def test_a_ring_may_be_written_on_when_the_copy_of_its_row_has_ended_well_or_not(at: Setting, there: bool) -> None:
    if not there:
        at.mover.detach(STORE)
    at.mover.begin_ring(9, 3)
    assert allowed(at, 9) == 3
    at.mover.post(StoreJob(1, STORE, OURS, THEIRS, ring=9, free_layer=5))
    assert end(at.hear(1)[0]) == (1, there)
    at.gate.wait([9], 5)
    assert allowed(at, 9) == 5
    at.mover.post(StoreJob(2, STORE, OURS, THEIRS, ring=9))
    assert end(at.hear(1)[0]) == (2, there)
    at.gate.wait([9], 1000)  # it is over


def test_a_ring_whose_copies_are_others_is_opened_by_word(at: Setting) -> None:
    at.mover.begin_ring(9, 1)
    at.mover.open_ring(9, 4)
    at.mover.open_ring(9, 2)  # what may be written stays so
    assert allowed(at, 9) == 4
    at.mover.open_ring(9, None)
    at.gate.wait([9], 1000)
    at.mover.open_ring(9, 7)  # it is over, and nobody's any more
    assert at.gate.calls == []


@pytest.mark.parametrize("there", [True, False])
def test_who_hears_of_the_last_copy_of_a_ring_may_load_under_its_number_at_once(
    at: Setting, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop may be quicker than the thread that told it."""
    tell, held_back = at.mover._on_event, list[list[int]]()

    def on_event(event: BlockEvent) -> None:
        held_back.append(at.gate.calls)
        tell(event)

    monkeypatch.setattr(at.mover, "_on_event", on_event)
    if not there:
        at.mover.detach(STORE)
    at.mover.begin_ring(9, 3)
    at.mover.post(StoreJob(1, STORE, OURS, THEIRS, ring=9))
    assert end(at.hear(1)[0]) == (1, there)
    assert held_back == [[]]
