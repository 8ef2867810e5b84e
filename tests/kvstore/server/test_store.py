"""Decisions of the core: greeting, tcp traffic, reports, events."""

from typing import Any

import pytest

from common.errors import ConfigError, ProtocolViolation
from common.ids import RequestId
from common.messages.blocks import Find, Found, Put, Reserve, Reserved, Stored
from common.messages.liveness import Hello, Ping, Refused, Report, Welcome
from common.messages.requests import Cancel
from kvstore.server.core import reads
from kvstore.server.core.actions import Pages, Reply, ShapeMemory, Write
from kvstore.server.core.store import Budget, KvStoreCore
from tests.kvstore.server.builders import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    FILE_BYTES,
    LAYOUT,
    PEER,
    ask,
    chain,
    core,
    identity,
    member,
    name,
)


def put(kept: KvStoreCore, *numbers: int, frames_bytes: list[int] | None = None) -> tuple[list[Write], Stored]:
    lengths = [BLOCK_BYTES] * len(numbers) if frames_bytes is None else frames_bytes
    *writes, last = kept.on_message(PEER, Put(call=1, blocks=chain(*numbers)), lengths, 0.0)
    assert isinstance(last, Reply)
    assert isinstance(last.message, Stored)
    return [write for write in writes if isinstance(write, Write)], last.message


def fetch(kept: KvStoreCore, *numbers: int) -> tuple[Found, tuple[Pages, ...]]:
    find = Find(call=2, blocks=tuple(map(name, numbers)), lease_ms=0, payloads=True)
    (reply,) = kept.on_message(PEER, find, [], 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Found)
    assert reply.message.pages == ()
    return reply.message, reply.blocks


def report(kept: KvStoreCore, now_ms: float = 0.0) -> Report:
    return ask(kept, Ping(sequence=7), Report, now_ms=now_ms)


def counters(kept: KvStoreCore) -> dict[str, float]:
    return {key: value for key, value in report(kept).counters.items() if value}


def test_what_was_put_is_fetched_from_the_pages_it_was_written_to() -> None:
    kept = core()
    writes, stored = put(kept, 1, 2)
    assert (stored.call, stored.n_blocks, stored.text) == (1, 2, "")
    found, pages = fetch(kept, 1, 2, 3)
    assert (found.call, found.n_blocks, found.more, found.tiers) == (2, 2, False, ("host", "host"))
    assert list(pages) == [write.pages for write in sorted(writes, key=lambda write: write.frame)]
    assert report(kept).gauges["pinned_blocks"] == 0


def test_a_fetch_stops_at_the_first_block_that_is_missing() -> None:
    kept = core()
    put(kept, 1, 3)
    assert fetch(kept, 1, 2, 3)[0].n_blocks == 1
    assert fetch(kept, 2, 1)[0].n_blocks == 0


@pytest.mark.parametrize(
    ("frames_bytes", "reason"),
    [
        ([BLOCK_BYTES], "2 blocks came with 1 payload frames"),
        ([BLOCK_BYTES, BLOCK_BYTES - 1], f"keeps blocks of {BLOCK_BYTES} bytes"),
    ],
)
def test_a_put_that_does_not_fit_changes_nothing_and_says_why(frames_bytes: list[int], reason: str) -> None:
    kept = core()
    writes, stored = put(kept, 1, 2, frames_bytes=frames_bytes)
    assert (writes, stored.n_blocks) == ([], 0)
    assert reason in stored.text
    assert report(kept).pages.cached == 0
    assert counters(kept) == {"refused_blocks_total": 2}


@pytest.mark.parametrize(("field", "value"), [("name", b"short"), ("parent", b""), ("depth", -1), ("depth", 2**32)])
def test_a_name_that_is_none_is_refused(field: str, value: object) -> None:
    fields: dict[str, Any] = {"name": name(1), "parent": name(0), "depth": 0, field: value}
    blocks = (type(chain(1)[0])(**fields),)
    stored = core().on_message(PEER, Put(call=1, blocks=blocks), [BLOCK_BYTES], 0.0)[-1]
    assert isinstance(stored, Reply)
    assert isinstance(stored.message, Stored)
    assert stored.message.text
    reserved = ask(core(), Reserve(call=1, blocks=blocks), Reserved)
    assert reserved.text
    assert reserved.pages == ((),)


def test_of_a_put_that_is_too_long_the_leading_blocks_are_kept_and_none_of_its_own_goes() -> None:
    kept = core(capacity_blocks=3)
    put(kept, 8, 9)
    put(kept, 1)
    writes, stored = put(kept, 1, 2, 3, 4)
    assert [write.frame for write in writes] == [1, 2]
    assert stored.n_blocks == 3
    assert fetch(kept, 1, 2, 3, 4)[0].n_blocks == 3
    kept.check()


def test_without_a_model_the_first_hello_fixes_the_layout() -> None:
    kept = core(layout=None)
    assert kept.start() == []
    assert "Hello" in put(kept, 1)[1].text
    assert fetch(kept, 1)[0].n_blocks == 0
    assert "Hello" in ask(kept, Reserve(call=1, blocks=chain(1)), Reserved).text
    assert ask(kept, Hello(member=member("gateway")), Welcome) == Welcome(member=member())
    actions = kept.on_message(PEER, Hello(member=member("prefill", identity())), [], 0.0)
    assert actions == [ShapeMemory(LAYOUT, 4 * LAYOUT.layers), Reply(PEER, Welcome(member=member()))]
    assert kept.capacity_blocks == 4
    assert put(kept, 1)[1].n_blocks == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"layers": 1000}, "too small"), ({"dtype": "int3"}, "'int3'"), ({"kv_heads": 0}, "0 heads")],
)
def test_a_hello_that_cannot_work_fixes_nothing_and_says_why(changes: dict[str, Any], text: str) -> None:
    kept = core(layout=None)
    refused = ask(kept, Hello(member=member("prefill", identity(**changes))), Refused)
    assert text in refused.text
    assert kept.capacity_blocks == 0
    assert ask(kept, Hello(member=member("prefill", identity())), Welcome)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(1000), f"--host-memory=1000 B is too small: a block takes {BLOCK_BYTES} bytes"),
        (Budget(BLOCK_BYTES, FILE_BYTES - 1), r"--disk-size=.* is too small for a block of"),
    ],
)
def test_a_budget_below_one_block_is_refused_at_start(budget: Budget, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        KvStoreCore(member(), budget, LAYOUT)


def test_pages_never_exceed_the_budget() -> None:
    for extra_bytes in (0, 1, BLOCK_BYTES - 1):
        made = KvStoreCore(member(), Budget(5 * BLOCK_BYTES + extra_bytes), LAYOUT)
        assert made.report(1, 0.0).pages.total == 5 * LAYOUT.layers


def test_a_run_too_long_for_one_answer_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "REPLY_LIMIT_BYTES", 2 * BLOCK_BYTES)
    kept = core()
    put(kept, 1, 2, 3)
    first, _ = fetch(kept, 1, 2, 3, 4)
    assert (first.n_blocks, first.more) == (2, True)
    rest, _ = fetch(kept, 3, 4)
    assert (rest.n_blocks, rest.more) == (1, False)
    assert counters(kept)["missed_tokens_total"] == BLOCK_TOKENS


def test_a_report_counts_pages_tokens_and_bytes() -> None:
    kept = core(capacity_blocks=2)
    put(kept, 1, 2)
    put(kept, 3)
    fetch(kept, 3, 9)
    found = report(kept)
    assert (found.sequence, found.role, found.worker) == (7, "kvstore", "kvstore-0")
    assert (found.pages.total, found.pages.free, found.pages.cached) == (4, 0, 4)
    assert counters(kept) == {
        "hit_tokens_total{tier=host}": BLOCK_TOKENS,
        "missed_tokens_total": BLOCK_TOKENS,
        "evicted_blocks_total": 1,
        "stored_blocks_total": 3,
        "kv_received_bytes_total": 3 * BLOCK_BYTES,
        "kv_sent_bytes_total": BLOCK_BYTES,
    }
    assert found.gauges["blocks{tier=host}"] == 2
    assert found.gauges["bytes{tier=host}"] == 2 * BLOCK_BYTES
    assert found.gauges["blocks{tier=disk}"] == 0


def test_a_repeated_put_moves_no_bytes() -> None:
    kept = core()
    put(kept, 1)
    writes, stored = put(kept, 1)
    assert (writes, stored.n_blocks) == ([], 1)
    assert counters(kept)["kv_received_bytes_total"] == BLOCK_BYTES


@pytest.mark.parametrize(("model", "welcome"), [(None, True), (identity(), True), (identity(head_dim=4), False)])
def test_a_worker_of_another_layout_is_refused_with_the_difference(model: Any, welcome: bool) -> None:
    (reply,) = core().on_message(PEER, Hello(member=member("prefill", model)), [], 0.0)
    assert isinstance(reply, Reply)
    if welcome:
        assert reply.message == Welcome(member=member())
    else:
        assert isinstance(reply.message, Refused)
        assert "head_dim: 8 here, 4 there" in reply.message.text


def test_a_message_that_is_not_for_a_store_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="Cancel"):
        core().on_message(PEER, Cancel(request=RequestId("r")), [], 0.0)


def test_names_that_are_none_cannot_be_asked_for() -> None:
    with pytest.raises(ProtocolViolation, match="names that are none"):
        core().on_message(PEER, Find(call=1, blocks=(b"short",), lease_ms=1), [], 0.0)


@pytest.mark.parametrize(("eviction", "kept_numbers"), [("lru", (8, 9)), ("cost-aware", (1, 2))])
def test_the_eviction_flag_decides_what_goes(eviction: str, kept_numbers: tuple[int, ...]) -> None:
    """Blocks 1 and 2 are dear (deep in a chain); 8 and 9 were used last."""
    kept = core(capacity_blocks=4, eviction=eviction)
    deep = tuple(type(one)(one.name, one.parent, one.depth + 4096) for one in chain(1, 2))
    kept.on_message(PEER, Put(call=1, blocks=deep), [BLOCK_BYTES] * 2, 0.0)
    put(kept, 8, 9)
    put(kept, 5, 6)
    assert fetch(kept, *kept_numbers)[0].n_blocks == 2


def test_events_tell_of_every_change_under_one_sequence_of_numbers() -> None:
    kept = core(capacity_blocks=2)
    put(kept, 1, 2)
    first = kept.take_events()
    put(kept, 3)
    events = [*first, *kept.take_events()]
    assert kept.take_events() == []
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert [(event.kind, event.name, event.tier) for event in events] == [
        ("stored", name(1), "host"),
        ("stored", name(2), "host"),
        ("removed", name(2), "host"),
        ("stored", name(3), "host"),
    ]
    assert (events[1].parent, events[1].depth) == (name(1), 1)


def test_a_tier_that_is_not_there_has_no_part_in_the_memory_report() -> None:
    kept = core(capacity_blocks=2)
    put(kept, 1)
    parts = [(part.owner, part.tier, part.n_bytes) for part in kept.report(1, 0.0).memory]
    assert parts == [("cached", "host", BLOCK_BYTES), ("free", "host", BLOCK_BYTES)]
    assert core(layout=None).report(1, 0.0).memory == (), "before a layout is known there is no memory"
