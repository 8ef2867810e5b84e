"""Reserve, Publish, roll-back; the writer's silence and death."""

import pytest

from common.errors import ProtocolViolation
from common.ids import PeerId
from common.messages.blocks import BlockName, Find, Found, Publish, Reserve, Reserved, Stored
from common.messages.liveness import PageCounts, Ping, Report
from kvstore.server.core.store import SILENT_MS, KvStoreCore
from tests.kvstore.server.builders import LAYOUT, OTHER, PEER, ask, block, chain, core, name

L = LAYOUT.layers


def reserve(kept: KvStoreCore, call: int, blocks: tuple[BlockName, ...], peer: PeerId = PEER) -> Reserved:
    return ask(kept, Reserve(call=call, blocks=blocks), Reserved, peer=peer)


def publish(kept: KvStoreCore, call: int, *, ok: bool = True, peer: PeerId = PEER) -> int:
    stored = ask(kept, Publish(call=call, ok=ok), Stored, peer=peer)
    assert stored.call == call
    return stored.n_blocks


def n_found(kept: KvStoreCore, *numbers: int) -> int:
    return ask(kept, Find(call=99, blocks=tuple(map(name, numbers)), lease_ms=0, payloads=True), Found).n_blocks


def pages(kept: KvStoreCore) -> PageCounts:
    return ask(kept, Ping(sequence=1), Report).pages


def test_reserved_blocks_are_seen_by_nobody_until_published() -> None:
    kept = core()
    reserved = reserve(kept, 1, chain(1, 2))
    assert [len(places) for places in reserved.pages] == [L, L]
    assert pages(kept).reserved == 2 * L
    assert n_found(kept, 1) == 0
    assert publish(kept, 1) == 2
    assert n_found(kept, 1, 2) == 2
    assert (pages(kept).reserved, pages(kept).cached) == (0, 2 * L)
    kept.check()


def test_a_writer_that_gave_up_leaves_nothing() -> None:
    kept = core()
    reserve(kept, 1, chain(1, 2))
    assert publish(kept, 1, ok=False) == 0
    assert pages(kept).free == 4 * L
    assert n_found(kept, 1) == 0
    kept.check()


def test_a_repeated_reserve_answers_the_same_pages_and_a_repeated_publish_is_harmless() -> None:
    kept = core()
    first = reserve(kept, 1, chain(1, 2))
    assert reserve(kept, 1, chain(1, 2)) == first
    assert pages(kept).reserved == 2 * L
    assert publish(kept, 1) == 2
    assert publish(kept, 1) == 0
    assert n_found(kept, 1, 2) == 2
    with_other_blocks = Reserve(call=2, blocks=chain(3))
    kept.on_message(PEER, with_other_blocks, [], 0.0)
    with pytest.raises(ProtocolViolation, match="other blocks"):
        kept.on_message(PEER, Reserve(call=2, blocks=chain(4)), [], 0.0)


def test_blocks_that_are_here_get_no_pages_and_count_as_held() -> None:
    kept = core()
    reserve(kept, 1, chain(1))
    publish(kept, 1)
    reserved = reserve(kept, 2, chain(1, 2))
    assert [len(places) for places in reserved.pages] == [0, L]
    assert publish(kept, 2) == 2


def test_when_room_is_short_the_leading_blocks_get_it_and_what_is_pinned_stays() -> None:
    kept = core(capacity_blocks=3)
    reserve(kept, 1, chain(1), OTHER)
    reserved = reserve(kept, 2, chain(5, 6, 7))
    assert [len(places) for places in reserved.pages] == [L, L, 0]
    assert reserved.text == ""
    nothing = reserve(kept, 3, chain(8))
    assert nothing.pages == ((),)
    assert "no room" in nothing.text
    assert publish(kept, 3) == 0
    assert publish(kept, 2) == 2


def test_of_two_writers_of_one_block_both_may_write_and_the_first_publish_wins() -> None:
    kept = core()
    mine, theirs = reserve(kept, 1, chain(1)), reserve(kept, 1, chain(1), OTHER)
    assert set(mine.pages[0]).isdisjoint(theirs.pages[0])
    assert publish(kept, 1, peer=OTHER) == 1
    assert publish(kept, 1) == 1
    found = ask(kept, Find(call=5, blocks=(name(1),), lease_ms=1000), Found)
    assert found.pages == theirs.pages
    assert (pages(kept).cached, pages(kept).free) == (L, 3 * L)
    kept.check()


def test_blocks_of_one_call_need_not_be_one_chain() -> None:
    kept = core(capacity_blocks=8)
    two_chains = (*chain(1, 2), *chain(11, 12), block(20, parent=19, depth=7), block(2, 1, 1))
    reserved = reserve(kept, 1, two_chains)
    assert [len(places) for places in reserved.pages] == [L] * 5 + [0]
    assert publish(kept, 1) == 6
    stored = {event.name: (event.parent, event.depth) for event in kept.take_events()}
    assert stored[name(12)] == (name(11), 1)
    assert stored[name(11)] == (name(0), 0)
    assert stored[name(20)] == (name(19), 7)
    kept.check()


def test_a_dead_writer_is_rolled_back_and_its_published_blocks_stay() -> None:
    kept = core()
    reserve(kept, 1, chain(1))
    publish(kept, 1)
    reserve(kept, 2, chain(2, 3))
    reserve(kept, 1, chain(4), OTHER)
    ask(kept, Find(call=3, blocks=(name(1),), lease_ms=30_000), Found)
    kept.on_peer_dead(PEER)
    assert pages(kept).reserved == L  # OTHER's
    assert n_found(kept, 1) == 1
    assert publish(kept, 2) == 0
    assert ask(kept, Ping(sequence=1), Report).gauges["pinned_blocks"] == 0
    kept.check()


def test_who_does_not_map_the_memory_reserves_nothing() -> None:
    """Nobody would tell of its death, so what it holds would be held for ever."""
    kept = core()
    kept.on_peer_dead(PEER)
    reserved = reserve(kept, 1, chain(1))
    assert reserved.pages == ((),)
    assert "does not map" in reserved.text
    assert pages(kept).free == 4 * L


def test_a_writer_that_pings_is_not_silent() -> None:
    kept = core()
    reserve(kept, 1, chain(1))
    reserve(kept, 1, chain(2), OTHER)
    ask(kept, Ping(sequence=1), Report, peer=OTHER, now_ms=SILENT_MS - 1)
    kept.on_tick(SILENT_MS - 1)
    assert kept.report(1, 0.0).pages.quarantined == 0
    kept.on_tick(SILENT_MS)
    assert (kept.report(1, 0.0).pages.reserved, kept.report(1, 0.0).pages.quarantined) == (L, L)


def test_a_silent_writers_pages_are_quarantined_and_never_given_to_others() -> None:
    kept = core(capacity_blocks=2)
    mine = reserve(kept, 1, chain(1))
    for now_ms in (SILENT_MS, 100 * SILENT_MS, 10_000 * SILENT_MS):
        ask(kept, Ping(sequence=1), Report, peer=OTHER, now_ms=now_ms)
        kept.on_tick(now_ms)
        assert kept.report(1, now_ms).pages.quarantined == L
    theirs = reserve(kept, 1, chain(5, 6), OTHER)
    assert set(mine.pages[0]).isdisjoint(theirs.pages[0])
    assert theirs.pages[1] == ()
    assert publish(kept, 1) == 1  # it was only slow
    assert n_found(kept, 1) == 1
    assert kept.report(1, 0.0).pages.quarantined == 0
    kept.check()


def test_the_kernels_word_ends_a_quarantine() -> None:
    kept = core()
    reserve(kept, 1, chain(1, 2))
    kept.on_tick(SILENT_MS)
    kept.on_peer_dead(PEER)
    assert pages(kept).free == 4 * L
    kept.check()
