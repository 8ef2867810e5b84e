"""Garbage under our keys in Redis: nobody falls over, what is readable is used, and it heals when its owner writes again."""

import random
from collections.abc import Iterator

import msgspec
import pytest
import redis

from common.errors import ConfigError
from common.ids import Incarnation, WorkerId, peer_id
from common.messages.cache_events import CacheEvent
from common.messages.liveness import Member
from common.net.cache_events import CacheEventPublisher, blocks_key, events_key
from common.net.cache_reader import CacheReader, CacheUnreachable
from common.net.redis import Membership, Registry
from common.net.redis_address import shown
from gateway.core.prompt_tree import Checked, PromptTree
from tests.gateway.model import identity
from tests.support.clients import until
from tests.support.redis import redis_server

CLUSTER = "c"
MEMBERS = f"penstock:{CLUSTER}:members"
DEEP = b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 50_000 + b"\x01"
GARBAGE = (
    b"",
    b"\xc1",
    b"\xff" * 40,
    b"\x81\xa2id\xa2\xff\xfe",
    DEEP,
    b"\x80",
    b"\xdd\xff\xff\xff\xff",
    b"x" * 1_000_000,
)


def member(name: str, incarnation: int = 1) -> Member:
    model = identity()
    return Member(
        id=WorkerId(name),
        role="decode",
        incarnation=Incarnation(incarnation),
        endpoint="tcp://127.0.0.1:1",
        host="h",
        pid=1,
        model=model,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator["redis.Redis"]:
    found = redis.Redis.from_url(url)
    found.flushall()
    yield found
    found.close()


def put_strange(client: "redis.Redis", key: str, kind: str) -> None:
    client.delete(key)
    match kind:
        case "string":
            client.set(key, b"\xff\x00")
        case "list":
            client.rpush(key, b"\xff", b"")
        case "set":
            client.sadd(key, b"\xff\xfe", b"")
        case "hash":
            client.hset(key, mapping={b"number": b"many", b"\xff": b"\xff", b"n" * 16: b"device,device,\xff,cellar"})
        case "stream":
            client.xadd(key, {b"peer": b"\xff", b"first": b"x"})


def test_records_that_are_none_hide_no_other(url: str, client: "redis.Redis") -> None:
    registry = Registry(url, CLUSTER)
    registry.announce(member("good"))
    for index, garbage in enumerate(GARBAGE):
        client.sadd(MEMBERS, f"bad-{index}")
        client.set(f"penstock:{CLUSTER}:member:bad-{index}", garbage)
    client.sadd(MEMBERS, b"\xff\xfe", b"", b"n" * 100_000)
    client.set(f"penstock:{CLUSTER}:member:".encode() + b"\xff\xfe", b"\xc1")
    client.sadd(MEMBERS, "alias")
    client.set(f"penstock:{CLUSTER}:member:alias", client.get(f"penstock:{CLUSTER}:member:good"))
    assert [one.id for one in registry.members()] == ["good"]
    registry.close()


@pytest.mark.parametrize("kind", ["string", "list", "hash", "stream"])
def test_a_strange_list_of_members_heals_when_somebody_announces_itself(
    url: str, client: "redis.Redis", kind: str
) -> None:
    put_strange(client, MEMBERS, kind)
    registry = Registry(url, CLUSTER)
    assert registry.members() == []
    registry.announce(member("one"))
    registry.announce(member("two"))
    assert [one.id for one in registry.members()] == ["one", "two"]
    registry.close()


@pytest.mark.parametrize("garbage", [GARBAGE[1], GARBAGE[3], DEEP], ids=["no-msgpack", "no-utf8", "deep"])
def test_a_record_overwritten_with_garbage_neither_stops_the_end_nor_lives_on(
    url: str, client: "redis.Redis", garbage: bytes
) -> None:
    one = member("one")
    registry = Registry(url, CLUSTER)
    registry.announce(one)
    client.set(f"penstock:{CLUSTER}:member:one", garbage)
    registry.withdraw(one)  # nothing of ours is there
    registry.announce(one)
    assert registry.members() == [one]
    registry.close()


def test_membership_goes_on_through_random_garbage(url: str, client: "redis.Redis") -> None:
    heard: list[list[str]] = []
    membership = Membership(url, CLUSTER, member("one"), lambda members: heard.append([one.id for one in members]))
    membership.join()
    rng = random.Random(5)
    good = client.get(f"penstock:{CLUSTER}:member:one")
    assert isinstance(good, bytes)
    for index in range(200):
        record = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            record[rng.randrange(len(record))] = rng.randrange(256)
        client.sadd(MEMBERS, f"r{index}")
        client.set(f"penstock:{CLUSTER}:member:r{index}", bytes(record))
    heard.clear()
    until(lambda: len(heard) > 0, "a reading")
    assert "one" in heard[-1]
    membership.stop()


def wrote(client: "redis.Redis", peer: str) -> bool:
    try:
        return bool(client.hexists(blocks_key(CLUSTER, peer), "written"))  # type: ignore[arg-type]
    except redis.ResponseError:
        return False


def publisher(url: str, name: str) -> CacheEventPublisher:
    return CacheEventPublisher(url, CLUSTER, member(name))


def event(number: int, block: int) -> CacheEvent:
    return CacheEvent(number, "stored", block.to_bytes(16, "big"))


def test_a_strange_snapshot_hides_no_other_and_heals(url: str, client: "redis.Redis") -> None:
    peers = [peer_id(WorkerId(name), Incarnation(1)) for name in ("a", "b")]
    writers = [publisher(url, name) for name in ("a", "b")]
    reader = CacheReader(url, CLUSTER, identity().name)
    for writer in writers:
        writer.publish([event(1, 7)])
    until(lambda: reader.numbers(peers) == dict.fromkeys(peers, 1), "both snapshots")
    for kind in ("string", "list", "hash", "set"):
        put_strange(client, blocks_key(CLUSTER, peers[0]), kind)
        assert reader.numbers(peers)[peers[1]] == 1
        reader.snapshot(peers[0], lambda: True)
        assert reader.snapshot(peers[1], lambda: True) is not None
        writers[0].publish([event(1, 8)])
        until(lambda: wrote(client, peers[0]), "a new snapshot")
    snapshot = reader.snapshot(peers[0], lambda: True)
    assert snapshot is not None
    assert sorted(name for _, names in snapshot.parts for name in names) == [
        block.to_bytes(16, "big") for block in (7, 8)
    ]
    for writer in writers:
        writer.close()
    reader.close()


@pytest.mark.parametrize("kind", ["string", "list", "hash", "set"])
def test_a_strange_stream_hides_no_other_and_heals(url: str, client: "redis.Redis", kind: str) -> None:
    peer = peer_id(WorkerId("a"), Incarnation(1))
    reader = CacheReader(url, CLUSTER, identity().name)
    reader.numbers([peer])
    writer = publisher(url, "a")
    put_strange(client, events_key(CLUSTER, None), kind)
    put_strange(client, events_key(CLUSTER, identity().name), kind)
    writer.publish([event(1, 7)])

    def heard() -> bool:
        try:
            return any(batch.peer == peer for batch in reader.read(None))
        except CacheUnreachable:
            return False

    until(heard, "the event")
    writer.close()
    reader.close()


def test_strange_entries_are_passed_over_and_never_read_twice(url: str, client: "redis.Redis") -> None:
    peer, key = peer_id(WorkerId("a"), Incarnation(1)), events_key(CLUSTER, identity().name)
    reader = CacheReader(url, CLUSTER, identity().name)
    reader.numbers([peer])
    encode = msgspec.msgpack.encode
    strange: list[dict[bytes, object]] = [
        {b"peer": b"\xff", b"first": 1, b"last": 1, b"events": b""},
        {b"peer": peer, b"first": 5, b"last": 1, b"events": b"\x90"},
        {b"peer": peer, b"first": -4, b"last": 2**70, b"events": b"\x90"},
        {b"other": b"x"},
        *({b"peer": peer, b"first": 1, b"last": 1, b"events": garbage} for garbage in GARBAGE),
        {b"peer": peer, b"first": 1, b"last": 1, b"events": encode([[1, "stored", b"n" * 15]])},
        {b"peer": peer, b"first": 1, b"last": 1, b"events": encode([[1, "stored", b"n" * 16, b"", 0, "cellar"]])},
        {b"peer": peer, b"first": 1, b"last": 1, b"events": encode([[1, "lost", b"n" * 16]])},
    ]
    for fields in strange:
        client.xadd(key, fields)  # type: ignore[arg-type]
    client.xadd(key, {b"peer": peer, b"first": 1, b"last": 1, b"events": encode([event(1, 7)])})
    batches = [batch for _ in range(10) for batch in reader.read(None)]
    assert batches[-1].events == (event(1, 7),)
    assert sum(len(batch.events) for batch in batches[:-1]) == 0, batches
    tree = PromptTree()
    for batch in batches:
        tree.put(batch)
    tree.apply_some(1_000, 0.0)
    tree.check()
    reader.close()


def test_a_number_far_ahead_of_its_owner_heals_with_the_next_snapshot() -> None:
    from common.messages.cache_events import CacheBatch, CacheSnapshot

    peer, tree = peer_id(WorkerId("a"), Incarnation(1)), PromptTree()
    tree.put(CacheSnapshot(peer, 10, [(("device",), [b"n" * 16])]))
    tree.put(CacheBatch(peer, 11, 2**62, ()))
    tree.apply_some(100, 0.0)
    assert tree.number(peer) == 2**62
    tree.put(Checked({peer: 11}))
    assert tree.apply_some(100, 0.0) == {peer}
    tree.put(CacheSnapshot(peer, 11, []))
    tree.apply_some(100, 0.0)
    assert tree.number(peer) == 11


def test_an_address_shows_neither_user_nor_password() -> None:
    assert shown("rediss://me:secret@host:6380/1") == "rediss://***@host:6380/1"
    assert shown("redis://:p%40ss@host/0?db=2") == "redis://***@host/0?db=2"
    assert shown("redis://host/0?password=secret&db=2") == "redis://host/0?password=***&db=2"
    assert shown("redis://127.0.0.1:6379/0") == "redis://127.0.0.1:6379/0"
    for mark in "/#?@:":
        assert shown(f"redis://:sec{mark}ret@127.0.0.1:6379/0") == "redis://***@127.0.0.1:6379/0"
    assert shown("me:secret@host") == "***@host"
    assert shown("redis://h/0?password=sec#ret") == "redis://h/0?password=***"


@pytest.mark.parametrize(
    "address",
    [
        *("redis://:secret@127.0.0.1:1/0", "http://:secret@host", "redis://:secret@host:port", "me:secret@host"),
        *(f"redis://{user}secret{mark}x@127.0.0.1:1/0" for user in ("", ":") for mark in "/#?"),
        *("redis://:[secret@h/0", "redis://:secret@h/0?nosuch=1"),
    ],
)
def test_errors_about_an_address_do_not_show_its_password(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Membership(address, CLUSTER, member("one"), lambda members: None).join()
    assert "secret" not in str(refused.value)
    with pytest.raises((ConfigError, CacheUnreachable)) as again:
        CacheReader(address, CLUSTER, "m").numbers([])
    assert "secret" not in str(again.value)
