from typing import Any

import pytest

from common.errors import ConfigError, ProtocolViolation
from common.ids import RequestId
from common.messages.kvstore import Fetch, Fetched, Forget, Put, Stored
from common.messages.liveness import Hello, Ping, Refused, Report, Welcome
from common.messages.requests import Cancel
from kvstore.server.core import store
from kvstore.server.core.store import KvStoreCore, Reply, Write
from tests.kvstore.server.builders import BLOCK_BYTES, LAYOUT, PEER, core, identity, member, name


def put(kept: KvStoreCore, *numbers: int, frames_bytes: list[int] | None = None) -> tuple[list[Write], Stored]:
    message = Put(call=1, blocks=tuple(map(name, numbers)))
    *writes, last = kept.on_message(PEER, message, frames_bytes or [BLOCK_BYTES] * len(numbers))
    assert isinstance(last, Reply)
    assert isinstance(last.message, Stored)
    return [write for write in writes if isinstance(write, Write)], last.message


def fetch(kept: KvStoreCore, *numbers: int) -> tuple[Fetched, tuple[int, ...]]:
    (reply,) = kept.on_message(PEER, Fetch(call=2, blocks=tuple(map(name, numbers))), [])
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Fetched)
    return reply.message, reply.slots


def counters(kept: KvStoreCore) -> dict[str, float]:
    return {key: value for key, value in kept.report(1).counters.items() if value}


def test_what_was_put_is_fetched_from_the_slots_it_was_written_to() -> None:
    kept = core()
    writes, stored = put(kept, 1, 2)
    assert (stored.call, stored.n_blocks, stored.text) == (1, 2, "")
    fetched, slots = fetch(kept, 1, 2, 3)
    assert (fetched.call, fetched.hits, fetched.more) == (2, 2, False)
    assert list(slots) == [write.slot for write in sorted(writes, key=lambda write: write.frame)]


def test_a_fetch_stops_at_the_first_block_that_is_missing() -> None:
    kept = core()
    put(kept, 1, 3)
    assert fetch(kept, 1, 2, 3)[0].hits == 1
    assert fetch(kept, 2, 1)[0].hits == 0


@pytest.mark.parametrize(
    ("frames_bytes", "reason"),
    [
        ([BLOCK_BYTES], "2 blocks came with 1 payload frames"),
        ([BLOCK_BYTES - 1] * 2, f"keeps blocks of {BLOCK_BYTES} bytes"),
        ([BLOCK_BYTES, BLOCK_BYTES - 1], "in one put"),
    ],
)
def test_a_put_that_does_not_fit_changes_nothing_and_says_why(frames_bytes: list[int], reason: str) -> None:
    kept = core()
    writes, stored = put(kept, 1, 2, frames_bytes=frames_bytes)
    assert (writes, stored.n_blocks) == ([], 0)
    assert reason in stored.text
    assert kept.report(1).pages.cached == 0
    assert counters(kept) == {"kv_refused_blocks_total": 2}


def test_a_name_that_is_no_hash_is_refused() -> None:
    reply = core().on_message(PEER, Put(call=1, blocks=(b"short",)), [BLOCK_BYTES])[-1]
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Stored)
    assert "16 bytes" in reply.message.text


def test_without_a_model_the_first_put_fixes_the_length_of_all_blocks() -> None:
    kept = core(layout=None)
    assert (kept.block_bytes, kept.report(1).pages.total) == (None, 0)
    assert fetch(kept, 1)[0].hits == 0
    assert put(kept, 1, frames_bytes=[BLOCK_BYTES // 2])[1].n_blocks == 1
    assert (kept.block_bytes, kept.capacity_blocks) == (BLOCK_BYTES // 2, 8)
    assert put(kept, 2)[1].n_blocks == 0


@pytest.mark.parametrize("frame_bytes", [0, 5 * BLOCK_BYTES])
def test_an_impossible_first_block_fixes_nothing(frame_bytes: int) -> None:
    kept = core(layout=None)
    assert put(kept, 1, frames_bytes=[frame_bytes])[1].text
    assert kept.block_bytes is None
    assert put(kept, 1)[1].n_blocks == 1


def test_a_budget_below_one_block_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="--host-memory=1000 B is too small"):
        KvStoreCore(member(), 1000, LAYOUT)


def test_a_run_too_long_for_one_answer_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REPLY_LIMIT_BYTES", 2 * BLOCK_BYTES)
    kept = core()
    put(kept, 1, 2, 3)
    first, _ = fetch(kept, 1, 2, 3, 4)
    assert (first.hits, first.more) == (2, True)
    rest, _ = fetch(kept, 3, 4)
    assert (rest.hits, rest.more) == (1, False)
    assert counters(kept)["kv_miss_blocks_total"] == 1


def test_a_report_counts_blocks_and_bytes() -> None:
    kept = core(capacity_blocks=2)
    put(kept, 1, 2)
    put(kept, 3)
    fetch(kept, 3, 9)
    kept.on_message(PEER, Forget(call=3, blocks=(name(3),)), [])
    (reply,) = kept.on_message(PEER, Ping(sequence=7), [])
    assert isinstance(reply, Reply)
    report = reply.message
    assert isinstance(report, Report)
    assert (report.sequence, report.role, report.worker) == (7, "kvstore", "kvstore-0")
    assert (report.pages.total, report.pages.free, report.pages.cached) == (2, 1, 1)
    assert counters(kept) == {
        "kv_hit_blocks_total": 1,
        "kv_miss_blocks_total": 1,
        "kv_evicted_blocks_total": 1,
        "kv_received_bytes_total": 3 * BLOCK_BYTES,
        "kv_sent_bytes_total": BLOCK_BYTES,
    }


def test_a_repeated_put_moves_no_bytes() -> None:
    kept = core()
    put(kept, 1)
    writes, stored = put(kept, 1)
    assert (writes, stored.n_blocks) == ([], 1)
    assert counters(kept)["kv_received_bytes_total"] == BLOCK_BYTES


@pytest.mark.parametrize(("model", "welcome"), [(None, True), (identity(), True), (identity(head_dim=4), False)])
def test_a_worker_of_another_layout_is_refused_with_the_difference(model: Any, welcome: bool) -> None:
    (reply,) = core().on_message(PEER, Hello(member=member("prefill", model)), [])
    assert isinstance(reply, Reply)
    if welcome:
        assert reply.message == Welcome(member=member())
    else:
        assert isinstance(reply.message, Refused)
        assert "head_dim: 8 here, 4 there" in reply.message.text


def test_a_message_that_is_not_for_a_store_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="Cancel"):
        core().on_message(PEER, Cancel(request=RequestId("r")), [])
