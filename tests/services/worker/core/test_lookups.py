"""Laws of what is looked up for a prompt: at most one find is kept, and every other one is given back."""

import msgspec
import pytest

from common.messages.actions import Send
from common.messages.blocks import Find, Found, Release
from services.worker.core.lookups import Lookups
from tests.services.worker.core.test_fetch_costs import NAMES, STORE, WORKER, R, ask, costs, found, lookups

WHOLE = len(NAMES)


def released(*calls: int) -> list[Release]:
    return [Release(call=call) for call in calls]


def said(actions: list[object] | None) -> list[object]:
    assert actions is not None, "the call is not ours"
    return [action.message for action in actions if isinstance(action, Send)]


def kept(target: Lookups) -> tuple[int, int] | None:
    """Call and length of what would be loaded."""
    one = target.take(R)
    return None if one is None else (one.call, one.end_block)


def asked(worker_has: int) -> Lookups:
    """A worker, under call 1, and then a store, under call 2, unless the worker has all of it."""
    target = lookups(costs(always=True))
    ask(target, WORKER, STORE)
    answers = said(target.on_found(WORKER.peer, found(1, worker_has), 1.0))
    assert [type(one) for one in answers] == ([] if worker_has == WHOLE else [Find])
    return target


def test_whoever_has_all_of_it_ends_the_search() -> None:
    target = asked(WHOLE)
    assert target.settled(R) and kept(target) == (1, WHOLE)


def test_the_longer_find_is_kept_and_the_shorter_one_given_back() -> None:
    target = asked(4)
    assert said(target.on_found(STORE.peer, found(2, 7), 2.0)) == released(1)
    assert kept(target) == (2, 7)
    target = asked(4)
    assert said(target.on_found(STORE.peer, found(2, 3), 2.0)) == released(2)
    assert kept(target) == (1, 4)


def test_what_a_prompt_does_without_is_given_back_also_while_others_are_asked() -> None:
    target = asked(WHOLE)
    assert said(target.forget(R)) == released(1)
    target = asked(4)
    assert said(target.forget(R)) == released(1)
    assert target.settled(R) and target.n_open == 0
    assert target.on_found(STORE.peer, found(2, 7), 3.0) is None, "whoever asks next gives a late answer back"


@pytest.mark.parametrize(("lease_ms", "holds"), [(6_000, False), (6_001, True)])
def test_a_lease_that_is_too_short_to_start_with_is_given_back(lease_ms: int, holds: bool) -> None:
    target = lookups(costs(always=True))
    ask(target, STORE)
    answer = msgspec.structs.replace(found(1, WHOLE), lease_ms=lease_ms)
    assert said(target.on_found(STORE.peer, answer, 1.0)) == ([] if holds else released(1))
    assert (kept(target) is not None) == holds and target.settled(R)


def test_a_find_is_stale_when_half_of_its_lease_is_over() -> None:
    target = asked(WHOLE)
    assert not target.is_stale(R, 5_000.0)
    assert target.is_stale(R, 5_001.0)


def test_a_late_answer_is_waited_for_no_longer_than_who_is_asked_needs() -> None:
    target = lookups(costs(always=True))
    ask(target, WORKER, STORE)
    assert said(target.on_tick(999.0)) == []
    (find,) = said(target.on_tick(1_000.0))
    assert isinstance(find, Find) and not target.settled(R)
    target.on_tick(3_499.0)
    assert not target.settled(R)
    target.on_tick(3_500.0)
    assert target.settled(R) and kept(target) is None and target.n_open == 0


def test_a_holder_that_died_leaves_nothing_to_load() -> None:
    target = asked(WHOLE)
    target.on_peer_dead(WORKER.peer, 2.0)
    assert kept(target) is None and target.n_open == 0
    target = asked(4)
    target.on_peer_dead(WORKER.peer, 2.0)
    target.on_found(STORE.peer, Found(call=2, n_blocks=0, lease_ms=10_000), 3.0)
    assert target.settled(R) and kept(target) is None


def test_only_who_was_asked_answers() -> None:
    target = lookups(costs(always=True))
    ask(target, STORE)
    assert target.on_found(WORKER.peer, found(1, WHOLE), 1.0) is None
    assert not target.settled(R)
