"""A life ends when a newer one keeps its name, and not for one that has just died."""

import msgspec

from common.ids import Incarnation, WorkerId
from common.messages.liveness import Member, newer_life
from common.policy.succession import STAYS_MS, Succession

MINE = Member(
    id=WorkerId("store"), role="kvstore", incarnation=Incarnation(1), endpoint="", host="h", pid=1, joined_unix_ms=5
)
NEWER = msgspec.structs.replace(MINE, incarnation=Incarnation(2), joined_unix_ms=6)
OLDER = msgspec.structs.replace(MINE, incarnation=Incarnation(3), joined_unix_ms=4)
OTHER = msgspec.structs.replace(NEWER, id=WorkerId("another"))


def test_a_newer_life_that_stays_ends_this_one_and_is_told_once() -> None:
    one = Succession()
    told = [
        one.on_newer(newer_life(MINE, [NEWER]), now_ms)
        for now_ms in (100.0, STAYS_MS, STAYS_MS + 100.0, STAYS_MS + 200.0)
    ]
    assert told == [False, False, True, False]
    assert one.over and one.successor == "store@0000000000000002"


def test_one_that_went_begins_its_time_anew() -> None:
    one = Succession()
    one.on_newer(newer_life(MINE, [NEWER]), 0.0)
    one.on_newer(newer_life(MINE, [MINE]), 3_000.0)
    assert not one.on_newer(newer_life(MINE, [NEWER]), 5_000.0) and not one.over


def test_of_lives_that_come_and_go_one_after_another_none_ends_this_one() -> None:
    one = Succession()
    for life in range(2, 20):
        newer = newer_life(MINE, [msgspec.structs.replace(NEWER, incarnation=Incarnation(life))])
        assert not one.on_newer(newer, 3_000.0 * life), "none was there for 4 s"
    assert one.on_newer(newer, 3_000.0 * 19 + STAYS_MS) and one.successor == newer


def test_older_lives_and_other_names_end_nobody() -> None:
    one = Succession()
    for now_ms in (0.0, 2 * STAYS_MS):
        assert not one.on_newer(newer_life(MINE, [MINE, OLDER, OTHER]), now_ms)
    assert not one.over
