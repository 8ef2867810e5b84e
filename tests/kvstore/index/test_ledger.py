"""Laws of page ownership."""

import random

import numpy as np
import pytest

from common.errors import OutOfPages
from common.ids import Owner, PageId
from kvstore.index.ledger import Ledger, LedgerMisuse, PageState

A, B = Owner("a"), Owner("b")


def test_a_refused_allocation_changes_nothing() -> None:
    ledger = Ledger(4)
    ledger.alloc(A, 3, PageState.RESERVED)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 of 4 are free"):
        ledger.alloc(B, 2, PageState.RESERVED)
    assert list(ledger.owners()) == [A]
    assert ledger.free_pages == 1
    ledger.check()


def test_an_owner_keeps_its_pages_in_order_of_allocation() -> None:
    ledger = Ledger(8)
    first = ledger.alloc(A, 2, PageState.ACTIVE)
    ledger.alloc(B, 1, PageState.ACTIVE)
    second = ledger.alloc(A, 3, PageState.ACTIVE)
    assert ledger.pages_of(A) == [*first, *second]


def test_one_call_gives_neighbours_also_after_a_free() -> None:
    ledger = Ledger(100)
    ledger.alloc(A, 40, PageState.ACTIVE)
    ledger.alloc(B, 40, PageState.ACTIVE)
    assert ledger.pages_of(A) == list(range(40))
    ledger.free(A)
    assert ledger.alloc(A, 30, PageState.ACTIVE).tolist() == list(range(30))


def test_a_grant_becomes_a_request_with_the_same_pages() -> None:
    ledger = Ledger(4)
    pages = ledger.alloc(A, 3, PageState.GRANTED)
    ledger.rename(A, B)
    ledger.move(B, PageState.ACTIVE)
    assert ledger.pages_of(B) == pages.tolist()
    assert ledger.state_of(A) is None
    assert (ledger.counts().granted, ledger.counts().active, ledger.counts().free) == (0, 3, 1)
    ledger.check()


def test_an_owner_of_no_pages_is_still_an_owner() -> None:
    ledger = Ledger(1)
    assert ledger.alloc(A, 0, PageState.GRANTED).size == 0
    assert ledger.free(A) == 0
    with pytest.raises(LedgerMisuse):
        ledger.free(A)


def test_a_second_free_is_an_error() -> None:
    ledger = Ledger(2)
    ledger.alloc(A, 1, PageState.ACTIVE)
    ledger.free(A)
    with pytest.raises(LedgerMisuse, match="freed before"):
        ledger.free(A)


def test_states_of_one_owner_do_not_mix_and_names_do_not_collide() -> None:
    ledger = Ledger(8)
    ledger.alloc(A, 1, PageState.ACTIVE)
    ledger.alloc(B, 1, PageState.GRANTED)
    with pytest.raises(LedgerMisuse, match="cannot take granted"):
        ledger.alloc(A, 1, PageState.GRANTED)
    with pytest.raises(LedgerMisuse, match="cannot take its name"):
        ledger.rename(B, A)
    with pytest.raises(LedgerMisuse, match="by free"):
        ledger.move(A, PageState.FREE)
    ledger.check()


def test_what_is_returned_is_a_copy() -> None:
    ledger = Ledger(4)
    ledger.alloc(A, 2, PageState.ACTIVE)[:] = 3
    ledger.pages_of(A).clear()
    assert ledger.free(A) == 2
    ledger.check()


def test_what_is_given_changes_hands_and_the_rest_stays() -> None:
    ledger = Ledger(8)
    pages = ledger.alloc(A, 5, PageState.ACTIVE)
    ledger.give(A, pages[[1, 3]], B, PageState.CACHED)
    assert (ledger.pages_of(A), ledger.pages_of(B)) == ([0, 2, 4], [1, 3])
    assert (ledger.state_of(A), ledger.state_of(B)) == (PageState.ACTIVE, PageState.CACHED)
    assert (ledger.counts().active, ledger.counts().cached, ledger.counts().free) == (3, 2, 3)
    ledger.check()


def test_only_free_pages_can_be_claimed_and_others_are_given_as_before() -> None:
    ledger = Ledger(6)
    ledger.alloc(A, 1, PageState.ACTIVE)
    ledger.claim(B, np.array([4, 2], np.int32), PageState.LENT)
    assert (ledger.pages_of(B), ledger.counts().lent) == ([4, 2], 2)
    for pages in ([0], [2], [3, 3], [6], [-1]):
        with pytest.raises(LedgerMisuse, match="not all free"):
            ledger.claim(B, np.array(pages, np.int32), PageState.LENT)
    ledger.check()
    assert ledger.alloc(A, 3, PageState.ACTIVE).tolist() == [1, 3, 5]


def test_a_page_that_comes_back_is_held_once() -> None:
    ledger = Ledger(8)
    pages = ledger.alloc(A, 3, PageState.ACTIVE)
    ledger.give(A, pages[:1], B, PageState.ACTIVE)
    ledger.give(B, pages[:1], A, PageState.ACTIVE)
    assert sorted(ledger.pages_of(A)) == [0, 1, 2]
    assert ledger.pages_of(B) == []
    ledger.check()
    assert (ledger.free(A), ledger.free(B), ledger.free_pages) == (3, 0, 8)
    ledger.check()


@pytest.mark.parametrize(
    "pages", [[0, 0], [0, 3], [-1], [4], [2]], ids=["twice", "of another", "negative", "too high", "free"]
)
def test_only_an_owner_s_own_pages_leave_it(pages: list[int]) -> None:
    ledger = Ledger(4)
    ledger.alloc(A, 2, PageState.ACTIVE)
    free_before, other = ledger.free_pages, Owner("c")
    assert free_before == 2
    for attempt in (
        lambda: ledger.free_some(A, np.array(pages, np.int32)),
        lambda: ledger.give(A, np.array(pages, np.int32), other, PageState.CACHED),
    ):
        with pytest.raises(LedgerMisuse, match="does not hold each of pages"):
            attempt()
        ledger.check()
    assert ledger.pages_of(A) == [0, 1]
    assert list(ledger.owners()) == [A]


def test_an_owner_of_another_state_gets_nothing_and_nothing_changes() -> None:
    ledger = Ledger(4)
    pages = ledger.alloc(A, 2, PageState.ACTIVE)
    ledger.alloc(B, 1, PageState.GRANTED)
    with pytest.raises(LedgerMisuse, match="cannot take cached"):
        ledger.give(A, pages, B, PageState.CACHED)
    with pytest.raises(LedgerMisuse, match="by free_some"):
        ledger.give(A, pages, Owner("c"), PageState.FREE)
    assert ledger.pages_of(A) == [0, 1]
    ledger.check()


def test_pages_freed_in_part_are_the_next_to_go_in_order() -> None:
    ledger = Ledger(8)
    pages = ledger.alloc(A, 6, PageState.ACTIVE)
    ledger.free_some(A, pages[2:5])
    assert ledger.alloc(B, 4, PageState.ACTIVE).tolist() == [2, 3, 4, 6]


@pytest.mark.parametrize("seed", range(6))
def test_pages_add_up_after_any_sequence_of_calls(seed: int) -> None:
    rng, ledger = random.Random(seed), Ledger(64)
    busy = [state for state in PageState if state is not PageState.FREE]
    live: dict[Owner, tuple[PageState, list[int]]] = {}
    for number in range(300):
        choice, owner = rng.random(), rng.choice(list(live)) if live else Owner("none")
        if choice < 0.4 or not live:
            new, state, wanted = Owner(f"o{number}"), rng.choice(busy), rng.randrange(12)
            if wanted <= ledger.free_pages:
                live[new] = (state, ledger.alloc(new, wanted, state).tolist())
        elif choice < 0.5:
            state = rng.choice(busy)
            ledger.move(owner, state)
            live[owner] = (state, live[owner][1])
        elif choice < 0.55:
            wanted = rng.choice([64, 80, rng.randrange(90)])
            held = [page for _, pages in live.values() for page in pages]
            assert ledger.resize(wanted) == max([wanted - 1, *held]) + 1
            assert ledger.free_pages == wanted - sum(page < wanted for page in held)
        elif choice < 0.6:
            ledger.rename(owner, Owner(f"r{number}"))
            live[Owner(f"r{number}")] = live.pop(owner)
        elif choice < 0.85:
            held = live[owner][1]
            some = rng.sample(held, rng.randrange(len(held) + 1))
            heir = rng.choice([None, *live])
            live[owner] = (live[owner][0], [page for page in held if page not in some])
            if heir is None:
                ledger.free_some(owner, np.array(some, np.int32))
            else:
                ledger.give(owner, np.array(some, np.int32), heir := Owner(f"h{number}"), PageState.CACHED)
                live[heir] = (PageState.CACHED, some)
        else:
            assert ledger.free(owner) == len(live.pop(owner)[1])
        ledger.check()
    assert {owner: (ledger.state_of(owner), ledger.pages_of(owner)) for owner in ledger.owners()} == live
    counts = ledger.counts()
    for state in busy:
        assert getattr(counts, state.value) == sum(len(pages) for held, pages in live.values() if held is state)


def test_pages_behind_the_end_are_not_given_again_once_they_are_freed() -> None:
    ledger = Ledger(8)
    pages = ledger.alloc(A, 8, PageState.ACTIVE)
    assert ledger.resize(4) == 8
    assert (ledger.counts().total, ledger.counts().active, ledger.total_pages) == (8, 8, 4)
    ledger.free_some(A, pages[[2, 7]])
    assert (ledger.free_pages, ledger.overhang_pages, ledger.counts().total, ledger.resize(4)) == (1, 3, 7, 7)
    ledger.free(A)
    assert (ledger.free_pages, ledger.resize(4)) == (4, 4)
    ledger.check()


def test_new_pages_are_given_after_all_others() -> None:
    ledger = Ledger(4)
    ledger.alloc(A, 1, PageState.ACTIVE)
    assert ledger.resize(6) == 6
    assert ledger.alloc(B, 5, PageState.ACTIVE).tolist() == [1, 2, 3, 4, 5]
    ledger.check()


def test_an_owner_that_gives_and_gets_for_ever_does_not_grow() -> None:
    ledger = Ledger(8)
    for _ in range(5000):
        pages = ledger.alloc(A, 2, PageState.CACHED)
        ledger.free_some(A, pages)
    assert ledger._held[A].n_listed < 2048
    assert sum(run.size for run in ledger._held[A].runs) == ledger._held[A].n_listed
    ledger.check()


@pytest.mark.parametrize("damage", ["lost", "twice", "miscounted", "foreign"])
def test_check_finds_every_kind_of_damage(damage: str) -> None:
    ledger = Ledger(8)
    ledger.alloc(A, 2, PageState.ACTIVE)
    match damage:
        case "lost":
            ledger._n_free -= 1
        case "twice":
            ledger._free[0] = PageId(0)
        case "miscounted":
            ledger._pages_in[PageState.ACTIVE] -= 1
            ledger._pages_in[PageState.CACHED] += 1
        case _:
            ledger._held[A].runs[0][0] = PageId(7)
    with pytest.raises(LedgerMisuse, match="do not add up: total 8"):
        ledger.check()
