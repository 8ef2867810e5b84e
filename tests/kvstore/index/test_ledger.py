"""Laws of page ownership."""

import random

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
    assert ledger.pages_of(A) == first + second


def test_one_call_gives_neighbours_also_after_a_free() -> None:
    ledger = Ledger(100)
    ledger.alloc(A, 40, PageState.ACTIVE)
    ledger.alloc(B, 40, PageState.ACTIVE)
    assert ledger.pages_of(A) == list(range(40))
    ledger.free(A)
    assert ledger.alloc(A, 30, PageState.ACTIVE) == list(range(30))


def test_a_grant_becomes_a_request_with_the_same_pages() -> None:
    ledger = Ledger(4)
    pages = ledger.alloc(A, 3, PageState.GRANTED)
    ledger.rename(A, B)
    ledger.move(B, PageState.ACTIVE)
    assert ledger.pages_of(B) == pages
    assert ledger.state_of(A) is None
    assert (ledger.counts().granted, ledger.counts().active, ledger.counts().free) == (0, 3, 1)
    ledger.check()


def test_an_owner_of_no_pages_is_still_an_owner() -> None:
    ledger = Ledger(1)
    assert ledger.alloc(A, 0, PageState.GRANTED) == []
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
    ledger.alloc(A, 2, PageState.ACTIVE).append(PageId(3))
    ledger.pages_of(A).clear()
    assert ledger.free(A) == 2
    ledger.check()


@pytest.mark.parametrize("seed", range(30))
def test_pages_add_up_after_any_sequence_of_calls(seed: int) -> None:
    rng, ledger = random.Random(seed), Ledger(64)
    busy = [state for state in PageState if state is not PageState.FREE]
    live: dict[Owner, tuple[PageState, list[PageId]]] = {}
    for number in range(300):
        choice, owner = rng.random(), rng.choice(list(live)) if live else Owner("none")
        if choice < 0.4 or not live:
            new, state, wanted = Owner(f"o{number}"), rng.choice(busy), rng.randrange(12)
            if wanted <= ledger.free_pages:
                live[new] = (state, ledger.alloc(new, wanted, state))
        elif choice < 0.6:
            state = rng.choice(busy)
            ledger.move(owner, state)
            live[owner] = (state, live[owner][1])
        elif choice < 0.7:
            ledger.rename(owner, Owner(f"r{number}"))
            live[Owner(f"r{number}")] = live.pop(owner)
        else:
            assert ledger.free(owner) == len(live.pop(owner)[1])
        ledger.check()
    assert {owner: (ledger.state_of(owner), ledger.pages_of(owner)) for owner in ledger.owners()} == live
    counts = ledger.counts()
    for state in busy:
        assert getattr(counts, state.value) == sum(len(pages) for held, pages in live.values() if held is state)


@pytest.mark.parametrize("damage", ["lost", "twice", "miscounted", "foreign"])
def test_check_finds_every_kind_of_damage(damage: str) -> None:
    ledger = Ledger(8)
    ledger.alloc(A, 2, PageState.ACTIVE)
    match damage:
        case "lost":
            ledger._free.pop()
        case "twice":
            ledger._free[0] = PageId(0)
        case "miscounted":
            ledger._pages_in[PageState.ACTIVE] -= 1
            ledger._pages_in[PageState.CACHED] += 1
        case _:
            ledger._free[0] = PageId(99)
    with pytest.raises(LedgerMisuse, match="do not add up: total 8"):
        ledger.check()
