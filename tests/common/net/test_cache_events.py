"""What a process caches, told through a real Redis: stream, snapshot, and how both heal."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages.cache_events import CacheEvent
from common.messages.liveness import Member
from common.net.cache_events import CacheEventPublisher, blocks_key, events_key
from common.net.cache_reader import News, Snapshot, read_events, read_snapshot
from common.net.redis import LEASE_MS
from tests.support.clients import until
from tests.support.redis import redis_binary, redis_server


def member(incarnation: int = 1) -> Member:
    return Member(id=WorkerId("w"), role="prefill", incarnation=Incarnation(incarnation), endpoint="", host="h", pid=1)


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
        self.publisher = CacheEventPublisher(url, cluster, member(), **options)

    def snapshot(self) -> Snapshot | None:
        try:
            return read_snapshot(self.client, self.cluster, PEER)
        except redis.ConnectionError:
            return None

    def await_number(self, number: int) -> Snapshot:
        until(lambda: (found := self.snapshot()) is not None and found.number == number, f"event {number} in Redis")
        found = self.snapshot()
        assert found is not None
        return found

    def news(self, after_number: int, **limit: int) -> News:
        return read_events(self.client, self.cluster, PEER, after_number, **limit)

    def close(self) -> None:
        self.publisher.close()
        self.client.close()


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
    assert redis.Redis.from_url(url).keys(f"penstock:{one.cluster}:*") == []


def test_events_arrive_in_order_with_every_field(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 7), stored(2, 8, "host")])
    watched.publisher.publish([])
    watched.publisher.publish([removed(3, 7)])
    watched.await_number(3)
    assert watched.news(0) == News((stored(1, 7), stored(2, 8, "host"), removed(3, 7)), gap=False)
    assert watched.news(1) == News((stored(2, 8, "host"), removed(3, 7)), gap=False)
    assert watched.news(3) == News((), gap=False)


def test_logs_of_two_tiers_become_one_row_of_numbers(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 7, "host"), stored(2, 8, "host"), stored(1, 7, "disk")])
    watched.publisher.publish([removed(3, 8, "host"), stored(2, 8, "disk")])
    assert watched.await_number(5).blocks == {name(7): ("disk", "host"), name(8): ("disk",)}
    news = watched.news(0)
    assert ([event.number for event in news.events], news.gap) == ([1, 2, 3, 4, 5], False)
    assert [event.tier for event in news.events] == ["host", "host", "disk", "host", "disk"]


def test_a_batch_is_one_entry_named_by_its_last_event(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1), stored(2, 2)])
    watched.publisher.publish([stored(3, 3)])
    watched.await_number(3)
    assert [entry for entry, _ in watched.client.xrange(events_key(watched.cluster, PEER))] == [b"2-0", b"3-0"]


def test_the_snapshot_holds_each_block_with_its_tiers(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1), stored(2, 2), stored(3, 2, "host"), stored(4, 3)])
    assert watched.await_number(4).blocks == {name(1): ("device",), name(2): ("device", "host"), name(3): ("device",)}
    watched.publisher.publish([removed(5, 2), removed(6, 1), stored(7, 1, "disk")])
    assert watched.await_number(7).blocks == {name(1): ("disk",), name(2): ("host",), name(3): ("device",)}
    watched.publisher.publish([removed(8, 2, "host"), removed(9, 3)])
    assert watched.await_number(9).blocks == {name(1): ("disk",)}


def test_both_records_have_the_worker_s_lease_and_it_is_renewed(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    for key in (events_key(watched.cluster, PEER), blocks_key(watched.cluster, PEER)):
        assert 0 < watched.client.pttl(key) <= LEASE_MS
        watched.client.persist(key)
        until(lambda key=key: watched.client.pttl(key) > 0, f"{key} has a lease again")  # type: ignore[misc]


def test_a_reader_with_a_limit_goes_on_where_it_stopped(watched: Watched) -> None:
    for number in range(1, 6):
        watched.publisher.publish([stored(number, number)])
    watched.await_number(5)
    first = watched.news(0, max_batches=2)
    assert first == News((stored(1, 1), stored(2, 2)), gap=False)
    assert watched.news(2, max_batches=2).events == (stored(3, 3), stored(4, 4))


def test_a_trimmed_stream_is_a_gap_that_the_snapshot_heals(watched: Watched) -> None:
    for number in range(1, 4):
        watched.publisher.publish([stored(number, number)])
    snapshot = watched.await_number(3)
    watched.client.xtrim(events_key(watched.cluster, PEER), maxlen=1, approximate=False)
    assert watched.news(0) == News((), gap=True)
    assert watched.news(0, max_batches=1) == News((), gap=True)
    watched.client.xtrim(events_key(watched.cluster, PEER), maxlen=0, approximate=False)
    assert watched.news(0) == News((), gap=True)
    assert set(snapshot.blocks) == {name(1), name(2), name(3)}
    watched.publisher.publish([stored(4, 4)])
    watched.await_number(4)
    assert watched.news(snapshot.number) == News((stored(4, 4),), gap=False)


def test_an_unreadable_entry_is_a_gap(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    watched.client.xadd(events_key(watched.cluster, PEER), {"events": b"\xc1"}, id="2-0")
    assert watched.news(0) == News((stored(1, 1),), gap=False)
    watched.publisher.publish([stored(2, 2), stored(3, 3)])
    watched.publisher.publish([stored(4, 4)])
    watched.await_number(4)
    watched.client.xdel(events_key(watched.cluster, PEER), "3-0")
    assert watched.news(0) == News((stored(1, 1),), gap=True)


def test_a_redis_that_lost_everything_gets_the_whole_snapshot_again(watched: Watched) -> None:
    watched.publisher.publish([stored(number, number) for number in range(1, 20)])
    watched.await_number(19)
    for key in watched.client.keys(f"penstock:{watched.cluster}:*"):
        watched.client.delete(key)
    watched.publisher.publish([removed(20, 1)])
    until(lambda: (found := watched.snapshot()) is not None and len(found.blocks) == 18, "the snapshot is back")
    assert watched.await_number(20).blocks == {name(block): ("device",) for block in range(2, 20)}


def test_what_redis_refused_is_written_when_it_takes_it_again(socket_path: Path) -> None:
    one = Watched(f"unix://{socket_path}", "full")
    try:
        with server_at(socket_path):
            one.publisher.publish([stored(1, 1)])
            one.await_number(1)
            before = one.publisher.failures_total
            one.client.config_set("maxmemory", "1")
            one.publisher.publish([stored(2, 2), removed(3, 1)])
            until(lambda: one.publisher.failures_total > before, "it was refused")
            one.client.config_set("maxmemory", "0")
            assert set(one.await_number(3).blocks) == {name(2)}
            assert one.news(1) == News((stored(2, 2), removed(3, 1)), gap=False)
    finally:
        one.close()


def test_an_entry_whose_answer_was_lost_is_not_written_twice(watched: Watched) -> None:
    watched.client.xadd(events_key(watched.cluster, PEER), {"events": b"\x90"}, id="1-0")
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    watched.publisher.publish([stored(2, 2)])
    assert set(watched.await_number(2).blocks) == {name(1), name(2)}
    assert [entry for entry, _ in watched.client.xrange(events_key(watched.cluster, PEER))] == [b"1-0", b"2-0"]
    assert watched.publisher.failures_total == 0


def test_a_snapshot_of_many_blocks_goes_in_parts(watched: Watched) -> None:
    n_blocks = 12_001
    watched.publisher.publish([stored(number, number) for number in range(1, n_blocks + 1)])
    assert len(watched.await_number(n_blocks).blocks) == n_blocks
    watched.client.delete(blocks_key(watched.cluster, PEER))
    until(lambda: (found := watched.snapshot()) is not None and len(found.blocks) == n_blocks, "it is back")
    assert watched.publisher.counters()["cache_event_failures_total"] == 0


def test_lives_of_one_worker_are_apart(watched: Watched) -> None:
    watched.publisher.publish([stored(1, 1)])
    watched.await_number(1)
    second = CacheEventPublisher(watched.url, watched.cluster, member(2))
    peer = peer_id(WorkerId("w"), Incarnation(2))
    until(lambda: read_snapshot(watched.client, watched.cluster, peer) == Snapshot(0, {}), "the second is there")
    second.close()
    assert read_snapshot(watched.client, watched.cluster, peer) is None
    assert watched.await_number(1).blocks == {name(1): ("device",)}


def test_nobody_there_is_no_snapshot_and_no_news(watched: Watched) -> None:
    nobody = PeerId("nobody@0")
    assert read_snapshot(watched.client, watched.cluster, nobody) is None
    assert read_events(watched.client, watched.cluster, nobody, 5) == News((), gap=False)


@contextmanager
def server_at(path: Path) -> Iterator[None]:
    """A Redis on that socket that keeps nothing."""
    process = subprocess.Popen(
        [redis_binary(), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(path.parent)],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis.from_url(f"unix://{path}")

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    try:
        until(answers, "Redis answers")
        yield
    finally:
        client.close()
        process.kill()
        process.wait(timeout=20)


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
        with server_at(socket_path):
            assert set(one.await_number(2).blocks) == {name(1), name(2)}
            assert one.news(0) == News((stored(1, 1), stored(2, 2)), gap=False)
    finally:
        one.close()


def test_a_restarted_redis_gets_the_snapshot_and_what_happened_meanwhile(socket_path: Path) -> None:
    one = Watched(f"unix://{socket_path}", "restarted")
    try:
        with server_at(socket_path):
            one.publisher.publish([stored(1, 1), stored(2, 2)])
            one.await_number(2)
        before = one.publisher.failures_total
        one.publisher.publish([removed(3, 1), stored(4, 4)])
        until(lambda: one.publisher.failures_total > before, "it noticed")
        with server_at(socket_path):
            assert set(one.await_number(4).blocks) == {name(2), name(4)}
            assert one.news(2) == News((removed(3, 1), stored(4, 4)), gap=False)
            assert one.news(0) == News((), gap=True)
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
        with server_at(socket_path):
            assert set(one.await_number(8).blocks) == {name(block) for block in range(1, 9)}
            assert one.news(0) == News((), gap=True)
            assert [event.number for event in one.news(4).events] == [5, 6, 7, 8]
    finally:
        one.close()
