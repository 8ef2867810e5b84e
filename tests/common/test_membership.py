"""Who is there, kept in Redis under a lease."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
import redis

from common.errors import ConfigError
from common.ids import Incarnation, WorkerId
from common.messages.liveness import Member, ModelIdentity
from common.net.redis import LEASE_MS, Membership, Registry, difference, refuse_misfit
from tests.support.redis import redis_server

MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="float32",
    layers=2,
    kv_heads=2,
    head_dim=8,
    block_tokens=16,
    vocab_tokens=100,
    context_tokens=64,
)
_LIMIT_S = 20.0


def member(name: str, incarnation: int = 1, *, model: ModelIdentity | None = MODEL, joined: int = 0) -> Member:
    return Member(
        id=WorkerId(name),
        role="decode",
        incarnation=Incarnation(incarnation),
        endpoint="tcp://127.0.0.1:1",
        host="h",
        pid=1,
        model=model,
        joined_unix_ms=joined,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as address:
        yield address


@pytest.fixture
def registry(url: str, request: pytest.FixtureRequest) -> Iterator[Registry]:
    made = Registry(url, request.node.name)
    yield made
    made.close()


@dataclass
class Heard:
    """Collects what a Membership reports, from its thread."""

    names: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_members(self, members: list[Member]) -> None:
        with self.changed:
            self.names = [one.id for one in members]
            self.changed.notify_all()

    def wait_for(self, *names: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.names == list(names), _LIMIT_S), self.names


def test_members_are_listed_by_id_with_every_field(registry: Registry) -> None:
    for name in ("b", "a"):
        registry.announce(member(name))
    assert registry.members() == [member("a"), member("b")]


def test_a_record_carries_a_lease(registry: Registry, url: str, request: pytest.FixtureRequest) -> None:
    registry.announce(member("a"))
    client = redis.Redis.from_url(url)
    left_ms = client.pttl(f"penstock:{request.node.name}:member:a")
    assert 0 < left_ms <= LEASE_MS
    client.delete(f"penstock:{request.node.name}:member:a")  # what the end of the lease does
    assert registry.members() == []
    assert client.smembers(f"penstock:{request.node.name}:members") == set()
    client.close()


def test_clusters_do_not_see_each_other(registry: Registry, url: str) -> None:
    registry.announce(member("a"))
    other = Registry(url, "another")
    assert other.members() == []
    other.close()


def test_withdrawing_never_removes_a_newer_life(registry: Registry) -> None:
    registry.announce(member("a", 2))
    registry.withdraw(member("a", 1))
    assert registry.members() == [member("a", 2)]
    registry.withdraw(member("a", 2))
    registry.withdraw(member("a", 2))
    assert registry.members() == []


def test_a_life_that_returns_does_not_write_over_its_successor(registry: Registry) -> None:
    old, new = member("a", 9, joined=1), member("a", 2, joined=2)
    registry.announce(old)
    registry.announce(new)
    registry.announce(old)
    assert registry.members() == [new]


def test_an_unreadable_record_hides_nobody_else(registry: Registry, url: str, request: pytest.FixtureRequest) -> None:
    registry.announce(member("a"))
    registry.announce(member("b"))
    client = redis.Redis.from_url(url)
    client.set(f"penstock:{request.node.name}:member:a", b"\xc1")
    client.close()
    assert registry.members() == [member("b")]


def test_a_membership_hears_who_comes_and_who_goes(url: str) -> None:
    heard = Heard()
    mine = Membership(url, "comings", member("a"), heard.on_members)
    other = Membership(url, "comings", member("b", 2), lambda _: None)
    mine.join()
    heard.wait_for("a")
    other.join()
    heard.wait_for("a", "b")
    other.stop()
    heard.wait_for("a")
    mine.stop()
    registry = Registry(url, "comings")
    assert registry.members() == []
    registry.close()


def test_after_redis_lost_everything_a_member_is_there_again(url: str) -> None:
    heard = Heard()
    mine = Membership(url, "lost", member("a"), heard.on_members)
    mine.join()
    client = redis.Redis.from_url(url)
    for key in client.keys("penstock:lost:*"):
        client.delete(key)
    client.close()
    heard.wait_for("a")
    registry = Registry(url, "lost")
    with heard.changed:
        assert heard.changed.wait_for(lambda: bool(registry.members()), _LIMIT_S)
    mine.stop()
    registry.close()


def test_no_redis_stops_the_start_and_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"redis='redis://127.0.0.1:1/0' does not answer"):
        Membership("redis://127.0.0.1:1/0", "c", member("a"), lambda _: None).join()


def test_a_misfit_does_not_join_and_leaves_no_record(url: str) -> None:
    registry = Registry(url, "misfit")
    registry.announce(member("old", 1, joined=1))
    other = msgspec.structs.replace(MODEL, dtype="bfloat16", layers=3)
    with pytest.raises(ConfigError, match="layers: 3 here, 2 there"):
        Membership(url, "misfit", member("new", 2, model=other, joined=2), lambda _: None).join()
    assert registry.members() == [member("old", 1, joined=1)]
    registry.close()


def test_the_difference_names_each_field_with_both_values() -> None:
    other = msgspec.structs.replace(MODEL, dtype="bfloat16", layers=3)
    assert difference(MODEL, other) == "dtype: 'float32' here, 'bfloat16' there; layers: 2 here, 3 there"
    assert difference(MODEL, MODEL) == ""


def test_of_two_that_do_not_fit_exactly_one_gives_way() -> None:
    other = msgspec.structs.replace(MODEL, layers=3)
    for joined in (1, 2, 3):
        mine, theirs = member("a", 7, joined=2), member("b", 9, model=other, joined=joined)
        refused = 0
        for one, two in ((mine, theirs), (theirs, mine)):
            try:
                refuse_misfit(one, [two])
            except ConfigError:
                refused += 1
        assert refused == 1


def test_other_models_and_processes_without_one_fit_beside_anything() -> None:
    refuse_misfit(member("a", 9, joined=9), [member("b", model=None), member("c", 9, joined=1)])
    renamed = msgspec.structs.replace(MODEL, name="another", layers=9)
    refuse_misfit(member("a", 9, joined=9), [member("b", model=renamed)])
    refuse_misfit(member("a", 9, model=None, joined=9), [member("b")])
