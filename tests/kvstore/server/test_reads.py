"""Find, leases, Release, and blocks that come back from disk."""

from collections.abc import Sequence

import pytest

from common.errors import ProtocolViolation
from common.messages.blocks import Find, Found, Put, Release
from common.messages.liveness import Ping, Report
from kvstore.server.core.actions import Action, DeleteDisk, DiskPaused, ReadDisk, Write, WriteDisk
from kvstore.server.core.disk_tier import PAUSE_MS
from kvstore.server.core.reads import DISK_WITHIN_MS, MAX_LEASE_MS
from kvstore.server.core.store import Budget, KvStoreCore
from tests.kvstore.server.builders import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    FILE_BYTES,
    LAYOUT,
    OTHER,
    PEER,
    answers,
    ask,
    chain,
    core,
    member,
    name,
)


def put(kept: KvStoreCore, *numbers: int, now_ms: float = 0.0) -> list[WriteDisk]:
    actions = kept.on_message(PEER, Put(call=1, blocks=chain(*numbers)), [BLOCK_BYTES] * len(numbers), now_ms)
    return [action for action in actions if isinstance(action, WriteDisk)]


def find(*numbers: int, call: int = 1, lease_ms: int = 1000, payloads: bool = False) -> Find:
    return Find(call=call, blocks=tuple(map(name, numbers)), lease_ms=lease_ms, payloads=payloads)


def gauges(kept: KvStoreCore, now_ms: float = 0.0) -> dict[str, float]:
    return ask(kept, Ping(sequence=1), Report, now_ms=now_ms).gauges


def reads_of(actions: Sequence[Action]) -> list[int]:
    return [int.from_bytes(one.block.name, "big") for one in actions if isinstance(one, ReadDisk)]


def on_disk(capacity_blocks: int, *numbers: int, host: tuple[int, ...] = ()) -> KvStoreCore:
    """A store with a chain on disk, of which only `host` (a leading part) is in host memory too."""
    kept = core(capacity_blocks, disk_blocks=len(numbers))
    kept.on_disk_scanned(chain(*numbers))
    if host:
        put(kept, *host)
    return kept


def test_a_found_run_is_pinned_until_it_is_released() -> None:
    kept = core(capacity_blocks=2)
    put(kept, 1, 2)
    found = ask(kept, find(1, 2, 3), Found)
    assert (found.n_blocks, found.lease_ms, found.tiers) == (2, 1000, ("host", "host"))
    assert [len(pages) for pages in found.pages] == [LAYOUT.layers] * 2
    assert gauges(kept, 7.0)["oldest_pin_ms"] == 7.0
    put(kept, 8, 9)
    assert gauges(kept)["cached_blocks"] == 2
    assert kept.on_message(PEER, Release(call=1), [], 0.0) == []
    assert gauges(kept)["pinned_blocks"] == 0
    put(kept, 8)
    assert ask(kept, find(1, 2, call=2), Found).n_blocks == 1
    kept.on_message(PEER, Release(call=77), [], 0.0)
    kept.check()


def test_a_lease_ends_by_itself_and_is_never_longer_than_allowed() -> None:
    kept = core()
    put(kept, 1)
    assert ask(kept, find(1, lease_ms=10**9), Found).lease_ms == MAX_LEASE_MS
    kept.on_tick(MAX_LEASE_MS - 1)
    assert gauges(kept)["pinned_blocks"] == 1
    kept.on_tick(MAX_LEASE_MS)
    assert gauges(kept)["pinned_blocks"] == 0
    assert ask(kept, find(1, lease_ms=-5, call=2), Found).lease_ms == 0
    kept.on_tick(0.0)
    assert gauges(kept)["pinned_blocks"] == 0


def test_a_reader_that_falls_silent_keeps_its_lease() -> None:
    """It may be reading still; what it reads within its lease must not change."""
    kept = core()
    put(kept, 1)
    ask(kept, find(1, lease_ms=MAX_LEASE_MS), Found)
    kept.on_tick(MAX_LEASE_MS - 1)
    assert gauges(kept)["pinned_blocks"] == 1


def test_a_repeated_find_is_answered_alike_and_counts_its_lease_anew() -> None:
    kept = core()
    put(kept, 1, 2)
    first = ask(kept, find(1, 2), Found)
    assert ask(kept, find(1, 2), Found, now_ms=900.0) == first
    kept.on_tick(1000.0)
    assert gauges(kept)["pinned_blocks"] == 2
    kept.on_tick(1900.0)
    assert gauges(kept)["pinned_blocks"] == 0
    ask(kept, find(1, call=5), Found)
    with pytest.raises(ProtocolViolation, match="other blocks"):
        kept.on_message(PEER, find(2, call=5), [], 0.0)


def test_leases_of_one_call_number_of_two_peers_are_two() -> None:
    kept = core()
    put(kept, 1)
    for peer in (PEER, OTHER):
        ask(kept, find(1), Found, peer=peer)
    kept.on_message(PEER, Release(call=1), [], 0.0)
    assert gauges(kept)["pinned_blocks"] == 1
    kept.on_peer_dead(OTHER)
    assert gauges(kept)["pinned_blocks"] == 0


def test_nothing_found_pins_nothing() -> None:
    kept = core()
    assert ask(kept, find(1), Found) == Found(call=1, n_blocks=0)
    assert gauges(kept)["oldest_pin_ms"] == 0


@pytest.mark.parametrize("payloads", [False, True])
def test_a_run_that_continues_on_disk_is_read_first_and_found_then(payloads: bool) -> None:
    kept = on_disk(6, 1, 2, 3, host=(1,))
    actions = kept.on_message(PEER, find(1, 2, 3, 4, payloads=payloads), [], 0.0)
    assert reads_of(actions) == [2, 3]
    assert len(actions) == 2
    assert kept.on_message(PEER, find(1, 2, 3, 4, payloads=payloads), [], 1.0) == []  # asked again: still on its way
    assert kept.on_disk_read(name(2), ok=True, now_ms=5.0) == []
    actions = kept.on_disk_read(name(3), ok=True, now_ms=6.0)
    (found,) = answers(actions, Found)
    assert (found.n_blocks, found.tiers) == (3, ("host", "disk", "disk"))
    counted = kept.report(1, 0.0).counters
    assert counted["hit_tokens_total{tier=disk}"] == 2 * BLOCK_TOKENS
    assert counted["kv_bytes_total{direction=disk_to_host}"] == 2 * BLOCK_BYTES
    assert gauges(kept)["pinned_blocks"] == (0 if payloads else 3)
    kept.on_message(PEER, Release(call=1), [], 0.0)
    assert gauges(kept)["pinned_blocks"] == 0
    assert ask(kept, find(1, 2, 3, call=9), Found).tiers == ("host",) * 3
    kept.check()


def test_a_bad_file_ends_the_run_and_is_forgotten() -> None:
    kept = on_disk(6, 1, 2, 3)
    kept.on_message(PEER, find(1, 2, 3), [], 0.0)
    kept.on_disk_read(name(1), ok=True, now_ms=0.0)
    (found,) = answers(kept.on_disk_read(name(2), ok=False, now_ms=0.0), Found)
    assert found.n_blocks == 1
    assert kept.on_disk_read(name(3), ok=True, now_ms=0.0) == []
    assert (gauges(kept)["blocks{tier=disk}"], gauges(kept)["blocks{tier=host}"]) == (2, 2)
    assert gauges(kept)["pinned_blocks"] == 1
    events = [(event.kind, event.name, event.tier) for event in kept.take_events()]
    assert ("removed", name(2), "disk") in events
    assert kept.report(1, 0.0).counters["load_failures_total"] == 1
    kept.check()


def test_a_slow_disk_is_waited_for_until_the_deadline() -> None:
    kept = on_disk(6, 1, 2)
    kept.on_message(PEER, find(1, 2), [], 0.0)
    kept.on_disk_read(name(1), ok=True, now_ms=1.0)
    assert kept.on_tick(DISK_WITHIN_MS - 1) == []
    (found,) = answers(kept.on_tick(DISK_WITHIN_MS), Found)
    assert found.n_blocks == 1
    assert kept.on_disk_read(name(2), ok=True, now_ms=DISK_WITHIN_MS + 1) == []  # late, but kept for the next
    assert ask(kept, find(1, 2, call=2), Found).n_blocks == 2
    kept.check()


@pytest.mark.parametrize("end", ["release", "death"])
def test_an_asker_that_goes_while_the_disk_is_read_leaves_nothing_pinned(end: str) -> None:
    kept = on_disk(6, 1, 2, host=(1,))
    kept.on_message(PEER, find(1, 2), [], 0.0)
    if end == "release":
        kept.on_message(PEER, Release(call=1), [], 0.0)
    else:
        kept.on_peer_dead(PEER)
    assert kept.on_disk_read(name(2), ok=True, now_ms=1.0) == []
    assert gauges(kept)["pinned_blocks"] == 0
    kept.check()


def test_two_that_want_one_block_from_disk_cause_one_read() -> None:
    kept = on_disk(6, 1)
    assert reads_of(kept.on_message(PEER, find(1), [], 0.0)) == [1]
    assert kept.on_message(OTHER, find(1), [], 0.0) == []
    found = answers(kept.on_disk_read(name(1), ok=True, now_ms=0.0), Found)
    assert [one.n_blocks for one in found] == [1, 1]
    assert found[0].pages == found[1].pages
    kept.check()


def test_a_block_that_is_put_while_it_is_read_is_held_once() -> None:
    kept = on_disk(6, 1)
    kept.on_message(PEER, find(1), [], 0.0)
    put(kept, 1)
    (found,) = answers(kept.on_disk_read(name(1), ok=True, now_ms=0.0), Found)
    assert found.n_blocks == 1
    assert kept.report(1, 0.0).pages.reserved == 0
    kept.check()


def test_of_a_run_that_does_not_fit_into_host_memory_the_leading_part_is_read() -> None:
    kept = on_disk(2, 1, 2, 3, 4)
    assert reads_of(kept.on_message(PEER, find(1, 2, 3, 4), [], 0.0)) == [1, 2]
    kept.on_disk_read(name(1), ok=True, now_ms=0.0)
    (found,) = answers(kept.on_disk_read(name(2), ok=True, now_ms=0.0), Found)
    assert found.n_blocks == 2
    assert ask(kept, find(3, call=2), Found).n_blocks == 0  # all is pinned
    kept.check()


# -- writing behind


def test_published_blocks_are_pinned_until_they_are_on_disk() -> None:
    kept = core(capacity_blocks=8, disk_blocks=8)
    writes = put(kept, 1, 2)
    assert [write.block.name for write in writes] == [name(1), name(2)]
    assert gauges(kept)["pinned_blocks"] == 2
    for write in writes:
        assert kept.on_disk_written(write.block.name, "", 1.0) == []
    assert gauges(kept)["pinned_blocks"] == 0
    assert gauges(kept)["blocks{tier=disk}"] == 2
    assert [event.tier for event in kept.take_events()] == ["host", "host", "disk", "disk"]
    assert put(kept, 1, 2) == []
    kept.check()


def test_the_bytes_are_in_place_before_they_are_written_to_disk() -> None:
    actions = core(8, disk_blocks=8).on_message(PEER, Put(call=1, blocks=chain(1)), [BLOCK_BYTES], 0.0)
    kinds = [type(action) for action in actions]
    assert kinds.index(Write) < kinds.index(WriteDisk)


def test_what_waits_for_the_disk_is_at_most_a_quarter_of_host_memory() -> None:
    kept = core(capacity_blocks=8, disk_blocks=100)
    assert len(put(kept, *range(1, 9))) == 2
    kept.check()


def test_a_full_disk_index_evicts_before_it_writes() -> None:
    kept = core(capacity_blocks=8, disk_blocks=1)
    put(kept, 1)
    kept.on_disk_written(name(1), "", 0.0)
    actions = kept.on_message(PEER, Put(call=1, blocks=chain(5)), [BLOCK_BYTES], 0.0)
    kinds = [type(action) for action in actions]
    assert kinds.index(DeleteDisk) < kinds.index(WriteDisk)
    kept.on_disk_written(name(5), "", 0.0)
    assert gauges(kept)["blocks{tier=disk}"] == 1
    kept.check()


def test_a_write_that_fails_pauses_writing_once_and_for_a_while() -> None:
    kept = core(capacity_blocks=8, disk_blocks=8)
    put(kept, 1, 2)
    assert kept.on_disk_written(name(1), "no space", 0.0) == [DiskPaused("no space", PAUSE_MS)]
    assert kept.on_disk_written(name(2), "no space", 1.0) == []
    assert put(kept, 3, now_ms=PAUSE_MS) == []
    assert gauges(kept)["pinned_blocks"] == 0
    assert [write.block.name for write in put(kept, 4, now_ms=PAUSE_MS + 1)] == [name(4)]
    kept.check()


def test_a_block_that_is_wrong_is_not_written_and_the_next_one_is() -> None:
    kept = core(capacity_blocks=8, disk_blocks=8)
    put(kept, 1)
    kept.on_disk_refused(name(1))
    assert gauges(kept)["pinned_blocks"] == 0 and ask(kept, find(1), Found).n_blocks == 0
    assert [write.block.name for write in put(kept, 2, now_ms=1.0)] == [name(2)]
    kept.check()


def test_a_condemned_block_is_found_by_nobody_and_goes_with_its_last_reader() -> None:
    kept = core(capacity_blocks=8)
    put(kept, 1, 2, 3)
    assert ask(kept, find(1, 2, 3), Found).n_blocks == 3
    wrong = kept.cached_pages([name(2), name(9)])
    kept.condemn(list(wrong))
    assert ask(kept, find(1, 2, 3, call=2), Found).n_blocks == 1
    assert kept.cached_pages([name(2)]) == wrong  # it is being read
    kept.on_message(PEER, Release(call=1), [], 0.0)
    kept.on_tick(1.0)
    assert kept.cached_pages([name(2)]) == {}
    put(kept, 1, 2, 3)
    assert ask(kept, find(1, 2, 3, call=3), Found).n_blocks == 3
    kept.check()


def test_a_condemned_block_is_read_from_its_file_again() -> None:
    kept = on_disk(8, 1, host=(1,))
    kept.condemn(list(kept.cached_pages([name(1)])))
    assert reads_of(kept.on_message(PEER, find(1), [], 0.0)) == [1]


def test_nothing_is_written_before_the_folder_was_read() -> None:
    kept = KvStoreCore(member(), Budget(8 * BLOCK_BYTES, 8 * FILE_BYTES), LAYOUT)
    kept.start()
    assert put(kept, 1) == []
    kept.on_disk_scanned([])
    assert len(put(kept, 2)) == 1
