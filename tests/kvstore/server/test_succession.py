"""A store whose name a newer life has taken takes nothing new, and ends when nobody reads there any more."""

from unittest.mock import MagicMock

import msgspec
import pytest

from common.ids import Incarnation
from common.log import Log
from common.messages.blocks import Find, Found, Publish, Put, Release, Reserve, Reserved, Stored
from common.messages.liveness import Ping, Report, newer_life
from common.policy.succession import STAYS_MS
from kvstore.server.core.store import KvStoreCore
from kvstore.server.inbox import MembersRead
from kvstore.server.service import KvStoreService
from tests.kvstore.server.builders import BLOCK_BYTES, PEER, answers, ask, chain, core, member, name

NEWER = msgspec.structs.replace(member(), incarnation=Incarnation(2), joined_unix_ms=1)
LEASE_MS = 10_000


def keeping(*numbers: int) -> KvStoreCore:
    made = core()
    made.on_message(PEER, Put(call=1, blocks=chain(*numbers)), [BLOCK_BYTES] * len(numbers), 0.0)
    return made


def succeed(kept: KvStoreCore) -> None:
    newer = newer_life(kept.mine, [NEWER])
    assert not kept.succession.on_newer(newer, 0.0)
    assert kept.succession.on_newer(newer, STAYS_MS)
    assert kept.succession.successor == "kvstore-0@0000000000000002"


def test_what_the_loop_hears_late_counts_from_when_it_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    kept = core()
    ports = MagicMock()
    ports.clock.now_ms.return_value = 3 * STAYS_MS
    service = KvStoreService(kept, ports, Log())
    for read_ms in (0.0, 500.0, STAYS_MS):
        assert not kept.over
        service._on_event(MembersRead([NEWER], read_ms))
    assert kept.over and '"succeeded"' in capsys.readouterr().err


def test_it_ends_at_once_if_nobody_reads_and_not_before_it_is_succeeded() -> None:
    kept = keeping(1, 2)
    assert not kept.over
    succeed(kept)
    assert kept.over


def test_reads_that_are_under_way_end_first() -> None:
    for ends_by_release in (True, False):
        kept = keeping(1, 2)
        assert ask(kept, Find(call=5, blocks=(name(1), name(2)), lease_ms=LEASE_MS), Found).n_blocks == 2
        succeed(kept)
        assert not kept.over
        if ends_by_release:
            kept.on_message(PEER, Release(call=5), [], STAYS_MS)
        else:
            kept.on_tick(float(LEASE_MS))
        assert kept.over
        kept.check()


def test_nothing_new_comes_in_or_is_lent_and_the_answer_says_why() -> None:
    kept = keeping(1)
    assert all(ask(kept, Reserve(call=3, blocks=chain(3)), Reserved).pages)
    succeed(kept)
    reserved = ask(kept, Reserve(call=4, blocks=chain(4)), Reserved)
    assert not any(reserved.pages) and "has taken this name" in reserved.text
    (stored,) = answers(kept.on_message(PEER, Put(call=6, blocks=chain(6)), [BLOCK_BYTES], 0.0), Stored)
    assert stored.n_blocks == 0 and "has taken this name" in stored.text
    assert ask(kept, Find(call=7, blocks=(name(1),), lease_ms=LEASE_MS), Found).n_blocks == 0
    assert ask(kept, Ping(sequence=1), Report).draining
    assert ask(kept, Publish(call=3, ok=True), Stored).n_blocks == 1, "what was begun may end"
    assert kept.over
