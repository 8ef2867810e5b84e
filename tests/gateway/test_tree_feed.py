"""Prompt trees of several gateways, fed by real publishers through a real Redis that fails in every way."""

import asyncio
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import redis

from common.block_hash import HASH_BYTES, BlockHash
from common.clock import MonotonicClock
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.log import Log
from common.messages.cache_events import CacheEvent, CacheSnapshot
from common.messages.liveness import Member, ModelIdentity
from common.net.cache_events import CacheEventPublisher, blocks_key, events_key
from common.net.cache_reader import CacheReader
from common.net.redis_outage import RedisOutage
from gateway.core.prompt_match import Held
from gateway.core.prompt_tree import PromptTree
from gateway.tree_keeper import TreeKeeper
from tests.support.clients import until
from tests.support.redis import redis_server, redis_server_at

T = TypeVar("T")
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


def member(name: str, role: str = "prefill", incarnation: int = 1) -> Member:
    model = None if role == "kvstore" else MODEL
    return Member(
        id=WorkerId(name),
        role=role,
        incarnation=Incarnation(incarnation),
        endpoint="",
        host="h",
        pid=1,
        model=model,
    )


def peer(one: Member) -> PeerId:
    return peer_id(one.id, one.incarnation)


A, B, STORE = member("a"), member("b"), member("s", "kvstore")


def chain(number: int, n_blocks: int) -> list[BlockHash]:
    return [
        BlockHash(blake2b(f"{number} {block}".encode(), digest_size=HASH_BYTES).digest()) for block in range(n_blocks)
    ]


def stored(names: Sequence[bytes], tier: str = "device") -> list[CacheEvent]:
    return [CacheEvent(0, "stored", name, tier=tier) for name in names]


def removed(names: Sequence[bytes], tier: str = "device") -> list[CacheEvent]:
    return [CacheEvent(0, "removed", name, tier=tier) for name in names]


class Gateway:
    """A tree, its keeper, and an event loop in a thread of its own."""

    def __init__(self, reader: CacheReader) -> None:
        self.tree = PromptTree()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.keeper = TreeKeeper(
            self.tree, reader, MonotonicClock(), RedisOutage(Log(), "redis://u:p@h/0", "prompt_tree")
        )
        self.ask(self.keeper.start)

    def ask(self, question: Callable[[], T]) -> T:
        """The answer, from the loop's own thread."""

        async def answered() -> T:
            return question()

        return asyncio.run_coroutine_threadsafe(answered(), self._loop).result(timeout=20)

    def run(self, one: Member, names: Sequence[BlockHash]) -> int:
        return self.ask(lambda: self.tree.match(names).device_run(peer(one)))

    def held(self, one: Member, names: Sequence[BlockHash]) -> Held:
        return self.ask(lambda: self.tree.match(names).held(peer(one), peer(STORE)))

    def total(self, name: str) -> float:
        return self.ask(self.keeper.counters)[name]

    def gauge(self, name: str) -> float:
        return self.ask(self.keeper.gauges)[name]

    def await_run(self, one: Member, names: Sequence[BlockHash], n_blocks: int) -> None:
        until(lambda: self.run(one, names) == n_blocks, f"{one.id} holds {n_blocks} blocks")

    def await_synced(self) -> None:
        until(lambda: self.gauge("tree_synced") == 1, "the tree is synced")

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.keeper.stop(), self._loop).result(timeout=20)
        self.ask(self.tree.check)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=20)
        self._loop.close()


def _feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tree-feed"]


class Cluster:
    """Publishers and gateways of one cluster, all closed at the end."""

    def __init__(self, url: str, name: str, stack: ExitStack) -> None:
        self.url, self.name, self._stack = url, name, stack
        self.redis = redis.Redis.from_url(url)
        stack.callback(self.redis.close)

    def publisher(self, one: Member) -> CacheEventPublisher:
        made = CacheEventPublisher(self.url, self.name, one)
        self._stack.callback(made.close)
        return made

    def gateway(self, *members: Member, reader: CacheReader | None = None) -> Gateway:
        made = Gateway(reader or CacheReader(self.url, self.name, "m"))
        self._stack.callback(made.close)
        made.keeper.on_members(list(members))
        return made

    def write(self, one: Member, number: int, names: Sequence[bytes]) -> None:
        """A snapshot without its events, as if Redis had lost them."""
        key = blocks_key(self.name, peer(one))
        rows: dict[bytes | str | int | float, bytes | str | int | float] = dict.fromkeys(names, "device")
        self.redis.hset(key, mapping={**rows, "number": number, "written": 1})

    def tell(self, one: Member, first: int, names: Sequence[bytes]) -> None:
        """Events without their share of the snapshot."""
        events = [CacheEvent(first + at, "stored", name) for at, name in enumerate(names)]
        fields = {"peer": peer(one), "first": first, "last": first + len(names) - 1}
        self.redis.xadd(events_key(self.name, "m"), {**fields, "events": msgspec.msgpack.encode(events)})


@contextmanager
def cluster_at(url: str, name: str) -> Iterator[Cluster]:
    before = set(_feeds())
    with ExitStack() as stack:
        yield Cluster(url, name, stack)
    assert set(_feeds()) == before


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as address:
        yield address


@pytest.fixture
def cluster(url: str, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster_at(url, request.node.name) as made:
        yield made


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        yield Path(folder) / "r.sock"


def test_two_gateways_agree_on_what_workers_and_stores_hold(cluster: Cluster) -> None:
    names = chain(1, 20)
    worker, store = cluster.publisher(A), cluster.publisher(STORE)
    worker.publish(stored(names[:6]))
    early = cluster.gateway(A, STORE)
    early.await_run(A, names, 6)
    store.publish(stored(names[:12], "host") + stored(names, "disk"))
    worker.publish(removed(names[4:6]))
    late = cluster.gateway(A, STORE)
    for gateway in (early, late):
        until(lambda gateway=gateway: gateway.held(A, names) == Held(4, 8, 8), "all is known")  # type: ignore[misc]
        gateway.await_synced()
        assert gateway.gauge("tree_lag_events") == 0
        assert gateway.total("tree_gaps_total") == 0


def test_events_during_a_long_snapshot_are_not_lost(cluster: Cluster) -> None:
    names = chain(1, 40_000)
    worker, other = cluster.publisher(A), cluster.publisher(B)
    worker.publish(stored(names[:20_000]))
    until(lambda: cluster.redis.hget(blocks_key(cluster.name, peer(A)), "number") == b"20000", "it is written")
    gateway = cluster.gateway(A, B)
    for at in range(20_000, 40_000, 100):
        worker.publish(stored(names[at : at + 100]))
        other.publish(stored(names[at - 20_000 : at - 19_900]))
    gateway.await_run(A, names, 40_000)
    gateway.await_run(B, names, 20_000)
    gateway.await_synced()
    assert gateway.total("tree_gaps_total") == 0


class Interrupted(CacheReader):
    """Something happens during the first snapshot."""

    def __init__(self, cluster: Cluster, happens: Callable[[], None]) -> None:
        super().__init__(cluster.url, cluster.name, "m")
        self._happens: list[Callable[[], None]] = [happens]

    def snapshot(self, peer: PeerId, between: Callable[[], bool]) -> CacheSnapshot | None:
        def interrupted() -> bool:
            if self._happens:
                self._happens.pop()()
            return between()

        return super().snapshot(peer, interrupted)


def test_events_that_are_read_during_their_holder_s_snapshot_count_after_it(cluster: Cluster) -> None:
    names = chain(1, 3000)
    cluster.write(A, 2000, names[:2000])
    reader = Interrupted(cluster, lambda: cluster.tell(A, 2001, names[2000:2010]))
    gateway = cluster.gateway(A, reader=reader)
    gateway.await_run(A, names, 2010)
    assert (gateway.total("tree_gaps_total"), gateway.total("tree_resyncs_total")) == (0, 1)


def test_a_dead_worker_s_blocks_vanish_and_its_next_life_begins_empty(cluster: Cluster) -> None:
    names = chain(1, 5)
    for one in (A, B):
        cluster.publisher(one).publish(stored(names))
    gateway = cluster.gateway(A, B)
    gateway.await_run(A, names, 5)
    gateway.await_run(B, names, 5)
    again = member("a", incarnation=2)
    cluster.publisher(again).publish(stored(names[:2]))
    gateway.keeper.on_members([again, B])
    gateway.await_run(again, names, 2)
    assert (gateway.run(A, names), gateway.run(B, names)) == (0, 5)


def test_a_dropped_batch_is_healed_by_the_snapshot(cluster: Cluster) -> None:
    names = chain(1, 9)
    cluster.write(A, 3, names[:3])
    gateway = cluster.gateway(A)
    gateway.await_run(A, names, 3)
    cluster.write(A, 7, names[:7])
    cluster.tell(A, 6, names[5:7])
    gateway.await_run(A, names, 7)
    assert gateway.total("tree_gaps_total") == 1
    assert gateway.total("tree_resyncs_total") >= 2


def test_events_lost_with_nothing_after_them_are_noticed(cluster: Cluster) -> None:
    names = chain(1, 9)
    cluster.write(A, 3, names[:3])
    gateway = cluster.gateway(A)
    gateway.await_run(A, names, 3)
    cluster.write(A, 9, names)
    gateway.await_run(A, names, 9)
    assert gateway.total("tree_gaps_total") == 1


def test_a_batch_that_was_written_twice_changes_nothing(cluster: Cluster) -> None:
    names = chain(1, 9)
    cluster.write(A, 3, names[:3])
    gateway = cluster.gateway(A)
    gateway.await_run(A, names, 3)
    cluster.tell(A, 4, names[3:5])
    cluster.tell(A, 4, names[3:5])
    cluster.tell(A, 1, names[6:9])
    cluster.tell(A, 6, names[5:6])
    gateway.await_run(A, names, 6)
    assert gateway.total("tree_repeats_total") == 2
    assert gateway.total("tree_gaps_total") == 0


def test_an_emptied_redis_heals_by_itself(cluster: Cluster) -> None:
    names = chain(1, 30)
    worker = cluster.publisher(A)
    worker.publish(stored(names[:10]))
    gateway = cluster.gateway(A)
    gateway.await_run(A, names, 10)
    for count in (20, 30):
        cluster.redis.flushall()
        worker.publish(stored(names[count - 10 : count]))
        gateway.await_run(A, names, count)
    gateway.await_synced()
    late = cluster.gateway(A)
    late.await_run(A, names, 30)


def test_a_redis_that_goes_and_comes_back_empty_heals_by_itself(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = chain(1, 30)
    with ExitStack() as servers:
        first = servers.enter_context(ExitStack())
        address = first.enter_context(redis_server_at(socket_path))
        with cluster_at(address, "c") as cluster:
            worker = cluster.publisher(A)
            worker.publish(stored(names[:10]))
            gateway = cluster.gateway(A)
            gateway.await_run(A, names, 10)
            first.close()
            until(lambda: gateway.total("tree_feed_failures_total") > 1, "it is missed")
            assert gateway.gauge("tree_connected") == 0 and gateway.keeper.outage.lost_s is not None
            worker.publish(removed(names[9:7:-1]))
            assert gateway.run(A, names) == 10  # what was known stays
            servers.enter_context(redis_server_at(socket_path))
            gateway.await_run(A, names, 8)
            gateway.await_synced()
            until(lambda: gateway.gauge("tree_connected") == 1, "it is back")
            assert gateway.keeper.outage.lost_s is None
            assert re.findall('"event": "(redis_[a-z]+)"', capsys.readouterr().err) == ["redis_lost", "redis_back"]
            worker.publish(stored(names[8:20]))
            gateway.await_run(A, names, 20)


@pytest.mark.system  # it waits for a socket's timeout
def test_a_redis_that_is_slow_is_counted_and_heals(socket_path: Path) -> None:
    names = chain(1, 10)
    with redis_server_at(socket_path) as address, cluster_at(address, "c") as cluster:
        worker = cluster.publisher(A)
        gateway = cluster.gateway(A)
        gateway.await_synced()
        cluster.redis.execute_command("CLIENT", "PAUSE", 6000, "ALL")
        worker.publish(stored(names))
        until(lambda: gateway.total("tree_feed_failures_total") > 0, "it is missed")
        gateway.await_run(A, names, 10)


def test_without_redis_nothing_is_held_and_everything_ends(socket_path: Path) -> None:
    with cluster_at(f"unix://{socket_path}", "c") as cluster:
        gateway = cluster.gateway(A)
        until(lambda: gateway.total("tree_feed_failures_total") > 1, "it tries again")
        assert gateway.held(A, chain(1, 3)) == Held(0)
        assert gateway.gauge("tree_synced") == 0
        with redis_server_at(socket_path):
            cluster.publisher(A).publish(stored(chain(1, 3)))
            gateway.await_run(A, chain(1, 3), 3)
