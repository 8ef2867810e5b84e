"""What a process caches, told through a real Redis: stream, snapshot, and how both heal."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages.cache_events import CacheBatch, CacheEvent, CacheSnapshot
from common.messages.liveness import Member, ModelIdentity
from common.net.cache_events import STREAM_TTL_MS, CacheEventPublisher, blocks_key, events_key
from common.net.cache_reader import CacheReader, CacheUnreachable
from common.net.redis import LEASE_MS
from tests.support.clients import until
from tests.support.redis import redis_server, redis_server_at


def member(incarnation: int = 1, model_name: str | None = "m") -> Member:
    model = None if model_name is None else msgspec.structs.replace(MODEL, name=model_name)
    return Member(
        id=WorkerId("w"),
        role="prefill",
        incarnation=Incarnation(incarnation),
        endpoint="",
        host="h",
        pid=1,
        model=model,
    )


MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="float32",
    layers=1,
    kv_heads=1,
    head_dim=1,
    block_tokens=16,
    vocab_tokens=9,
    context_tokens=9,
)
PEER = peer_id(WorkerId("w"), Incarnation(1))


def name(block: int) -> bytes:
    return block.to_bytes(16, "big")


def stored(number: int, block: int, tier: str = "device") -> CacheEvent:
    return CacheEvent(number, "stored", name(block), b"p" * 16, 3, tier)


def removed(number: int, block: int, tier: str = "device") -> CacheEvent:
    return CacheEvent(number, "removed", name(block), tier=tier)


class Watched:
    """One publisher and a reader of the same cluster."""

    def __init__(self, url: str, cluster: str, **options: int) -> None:
        self.url, self.cluster = url, cluster
        self.client = redis.Redis.from_url(url)
        self.stream = events_key(cluster, "m")
        self.publisher = CacheEventPublisher(url, cluster, member(), **options)
        self.reader = CacheReader(url, cluster, "m")

    def snapshot(self, peer: PeerId = PEER) -> CacheSnapshot | None:
        try:
            return self.reader.snapshot(peer, lambda: True)
        except CacheUnreachable:
            return None

    def await_number(self, number: int) -> dict[bytes, tuple[str, ...]]:
        """The blocks of the snapshot that is true up to that event, with their tiers."""
        until(lambda: (found := self.snapshot()) is not None and found.number == number, f"event {number} in Redis")
        found = self.snapshot()
        assert found is not None
        return tiers_of(found)

    def events(self) -> list[CacheEvent]:
        """Everything in the stream."""
        reader = CacheReader(self.url, self.cluster, "m")
        batches: list[CacheBatch] = []
        while more := reader.read(None):
            batches += more
        reader.close()
        return [event for batch in batches for event in batch.events]

    def close(self) -> None:
        self.publisher.close()
        self.reader.close()
        self.client.close()


def tiers_of(snapshot: CacheSnapshot) -> dict[bytes, tuple[str, ...]]:
    return {name: tiers for tiers, names in snapshot.parts for name in names}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as address:
        yield address


@pytest.fixture
def watched(url: str, request: pytest.FixtureRequest) -> Iterator[Watched]:
    one = Watched(url, request.node.name)
    one.await_number(0)
    yield one
    one.close()
    assert redis.Redis.from_url(url).keys(f"penstock:{one.cluster}:*") in ([], [one.stream.encode()])


def test_events_arrive_in_order_with_every_field(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 7), stored(2, 8, "host")])
    watched.publisher.publish([])
    watched.publisher.publish([removed(3, 7)])
    watched.await_number(3)
    assert watched.events() == [stored(1, 7), stored(2, 8, "host"), removed(3, 7)]


def test_logs_of_two_tiers_become_one_row_of_numbers(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 7, "host"), stored(2, 8, "host"), stored(1, 7, "disk")])
    watched.publisher.publish([removed(3, 8, "host"), stored(2, 8, "disk")])
    assert watched.await_number(5) == {name(7): ("disk", "host"), name(8): ("disk",)}
    assert [event.number for event in watched.events()] == [1, 2, 3, 4, 5]
    assert [event.tier for event in watched.events()] == ["host", "host", "disk", "host", "disk"]


def test_an_entry_says_whose_events_it_has_and_is_bounded(watched: Watched) -> None:
    watched.publisher.publish([stored(number, number) for number in range(1, 1002)])
    watched.await_number(1001)
    batches = CacheReader(watched.url, watched.cluster, "m").read(None)
    assert [batch.peer for batch in batches] == [PEER] * len(batches)
    assert [(batch.first, batch.last) for batch in batches] == [(1, 500), (501, 1000), (1001, 1001)]


def test_workers_of_a_model_share_a_stream_and_stores_of_all_models_have_theirs(watched: Watched) -> None:
    twin = CacheEventPublisher(watched.url, watched.cluster, member(2))
    other = CacheEventPublisher(watched.url, watched.cluster, member(3, "other"))
    store = CacheEventPublisher(watched.url, watched.cluster, member(4, None))
    lives = [peer_id(WorkerId("w"), Incarnation(number)) for number in range(1, 5)]
    for publisher in (watched.publisher, twin, other, store):
        publisher.publish([stored(1, 1)])
    until(lambda: list(watched.reader.numbers(lives).values()) == [1, 1, 1, 1], "all have written")
    batches = CacheReader(watched.url, watched.cluster, "m").read(None)
    for publisher in (twin, other, store):
        publisher.close()
    watched.client.delete(events_key(watched.cluster, "other"), events_key(watched.cluster, None))
    assert sorted(batch.peer for batch in batches) == [lives[0], lives[1], lives[3]]


def test_the_snapshot_holds_each_block_with_its_tiers(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1), stored(2, 2), stored(3, 2, "host"), stored(4, 3)])
    assert watched.await_number(4) == {name(1): ("device",), name(2): ("device", "host"), name(3): ("device",)}
    watched.publisher.publish([removed(5, 2), removed(6, 1), stored(7, 1, "disk")])
    assert watched.await_number(7) == {name(1): ("disk",), name(2): ("host",), name(3): ("device",)}
    watched.publisher.publish([removed(8, 2, "host"), removed(9, 3)])
    assert watched.await_number(9) == {name(1): ("disk",)}


def test_the_snapshot_has_the_worker_s_lease_and_the_stream_its_own(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    for key, ttl_ms in ((watched.stream, STREAM_TTL_MS), (blocks_key(watched.cluster, PEER), LEASE_MS)):
        assert 0 < watched.client.pttl(key) <= ttl_ms
        watched.client.persist(key)
        until(lambda key=key: watched.client.pttl(key) > 0, f"{key} has a lease again")  # type: ignore[misc]


def test_reading_begins_where_the_numbers_were_asked_for_and_goes_on_from_there(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    assert watched.reader.numbers([PEER]) == {PEER: 1}
    assert watched.reader.caught_up
    assert watched.reader.read(None) == []
    watched.publisher.publish([stored(2, 2)])
    watched.await_number(2)
    assert watched.reader.numbers([PEER]) == {PEER: 2}
    assert not watched.reader.caught_up
    assert watched.reader.read(None) == [CacheBatch(PEER, 2, 2, (stored(2, 2),))]
    assert watched.reader.caught_up


def test_a_stream_begun_anew_by_a_clock_that_is_behind_is_read_from_its_start(watched: Watched) -> None:
    watched.reader.numbers([])
    watched.client.xadd(watched.stream, {"no": "entry"}, id="99999999999999-0")
    assert watched.reader.read(None) == []
    watched.client.delete(watched.stream)
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    assert watched.reader.read(None) == []
    watched.reader.numbers([])
    assert watched.reader.read(None) == [CacheBatch(PEER, 1, 1, (stored(1, 1),))]


def test_an_unreadable_entry_is_a_batch_without_events_or_nothing_at_all(watched: Watched) -> None:
    numbers = {"peer": PEER, "first": 1, "last": 2}
    short = msgspec.msgpack.encode([CacheEvent(1, "stored", b"short"), CacheEvent(2, "stored", b"")])
    for events in ({"events": b"\xc1"}, {}, {"events": short}):
        watched.client.xadd(watched.stream, {**numbers, **events})
    watched.client.xadd(watched.stream, {"peer": PEER, "first": "one", "last": 2})
    watched.client.xadd(watched.stream, {"events": b"\x90"})
    assert CacheReader(watched.url, watched.cluster, "m").read(None) == [CacheBatch(PEER, 1, 2, ())] * 3


def test_a_redis_that_lost_everything_gets_the_whole_snapshot_again(watched: Watched) -> None:
    watched.publisher.publish([stored(number, number) for number in range(1, 20)])
    watched.await_number(19)
    for key in watched.client.keys(f"penstock:{watched.cluster}:*"):
        watched.client.delete(key)
    watched.publisher.publish([removed(20, 1)])
    until(lambda: (found := watched.snapshot()) is not None and len(tiers_of(found)) == 18, "the snapshot is back")
    assert watched.await_number(20) == {name(block): ("device",) for block in range(2, 20)}


def test_what_redis_refused_is_written_when_it_takes_it_again(socket_path: Path) -> None:
    with redis_server_at(socket_path):
        one = Watched(f"unix://{socket_path}", "full")
        try:
            one.publisher.publish([stored(1, 1)])
            one.await_number(1)
            before = one.publisher.failures_total
            one.client.config_set("maxmemory", "1")
            one.publisher.publish([stored(2, 2), removed(3, 1)])
            until(lambda: one.publisher.failures_total > before, "it was refused")
            one.client.config_set("maxmemory", "0")
            assert set(one.await_number(3)) == {name(2)}
            assert one.events() == [stored(1, 1), stored(2, 2), removed(3, 1)]
        finally:
            one.close()


def test_a_snapshot_of_many_blocks_goes_in_parts_and_is_read_in_slices(watched: Watched) -> None:
    n_blocks = 12_001
    watched.publisher.publish([stored(number, number) for number in range(1, n_blocks + 1)])
    assert len(watched.await_number(n_blocks)) == n_blocks
    watched.client.delete(blocks_key(watched.cluster, PEER))
    until(lambda: (found := watched.snapshot()) is not None and len(tiers_of(found)) == n_blocks, "it is back")
    assert watched.publisher.counters()["cache_event_failures_total"] == 0
    slices: list[None] = []
    watched.reader.snapshot(PEER, lambda: slices.append(None) is None)
    assert len(slices) > 5
    assert watched.reader.snapshot(PEER, lambda: False) is None


@pytest.mark.system  # it waits for the publisher to notice
def test_a_snapshot_rewritten_while_it_is_read_is_not_believed(watched: Watched) -> None:
    watched.publisher.publish([stored(number, number) for number in range(1, 3000)])
    watched.await_number(2999)
    key = blocks_key(watched.cluster, PEER)

    def lost_and_rewritten() -> bool:
        watched.client.delete(key)
        until(lambda: None not in watched.client.hmget(key, ["number", "written"]), "it is rewritten")
        return True

    assert watched.reader.snapshot(PEER, lost_and_rewritten) is None
    assert len(watched.await_number(2999)) == 2999


def test_what_was_added_to_a_snapshot_that_was_lost_is_not_believed(watched: Watched) -> None:
    ghost = PeerId("ghost@1")
    key = blocks_key(watched.cluster, ghost)
    watched.client.hset(key, mapping={name(1): "device", "number": 5})
    assert watched.snapshot(ghost) is None
    assert watched.reader.numbers([ghost]) == {ghost: None}
    watched.client.hset(key, "written", 1)
    assert watched.reader.numbers([ghost]) == {ghost: 5}
    watched.client.delete(key)


def test_lives_of_one_worker_are_apart(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    second = CacheEventPublisher(watched.url, watched.cluster, member(2))
    peer = peer_id(WorkerId("w"), Incarnation(2))
    until(lambda: watched.snapshot(peer) == CacheSnapshot(peer, 0, []), "the second is there")
    second.close()
    assert watched.snapshot(peer) is None
    assert watched.await_number(1) == {name(1): ("device",)}


def test_nobody_there_is_no_snapshot_and_no_number(watched: Watched) -> None:
    nobody = PeerId("nobody@0")
    assert watched.snapshot(nobody) is None
    assert watched.reader.numbers([nobody]) == {nobody: None}


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        yield Path(folder) / "r.sock"


def test_without_redis_nothing_waits_or_raises_and_the_first_server_gets_all(socket_path: Path) -> None:
    one = Watched(f"unix://{socket_path}", "late")
    try:
        one.publisher.publish([stored(1, 1)])
        until(lambda: one.publisher.failures_total > 1, "it tries again")
        one.publisher.publish([stored(2, 2)])
        with redis_server_at(socket_path):
            assert set(one.await_number(2)) == {name(1), name(2)}
            assert one.events() == [stored(1, 1), stored(2, 2)]
    finally:
        one.close()


def test_a_restarted_redis_gets_the_snapshot_and_what_happened_meanwhile(socket_path: Path) -> None:
    one = Watched(f"unix://{socket_path}", "restarted")
    try:
        with redis_server_at(socket_path):
            one.publisher.publish([stored(1, 1), stored(2, 2)])
            one.await_number(2)
        before = one.publisher.failures_total
        one.publisher.publish([removed(3, 1), stored(4, 4)])
        until(lambda: one.publisher.failures_total > before, "it noticed")
        with redis_server_at(socket_path):
            assert set(one.await_number(4)) == {name(2), name(4)}
            assert one.events() == [removed(3, 1), stored(4, 4)]
            assert one.publisher.dropped_total == 0
    finally:
        one.close()


def test_past_the_limit_the_oldest_batches_go_and_only_the_stream_lacks_them(socket_path: Path) -> None:
    one = Watched(f"unix://{socket_path}", "crowded", limit=4)
    try:
        for first in (1, 3, 5, 7):
            one.publisher.publish([stored(first, first), stored(first + 1, first + 1)])
        until(lambda: one.publisher.failures_total > 1, "the queue was put back")
        assert one.publisher.dropped_total == 4
        with redis_server_at(socket_path):
            assert set(one.await_number(8)) == {name(block) for block in range(1, 9)}
            assert [event.number for event in one.events()] == [5, 6, 7, 8]
    finally:
        one.close()
