"""A membership whose calls fail or are late, as those to a Redis that is ill."""

from contextlib import closing

import pytest
import redis

from common.ids import peer_id
from common.log import Log
from common.net.cache_events import blocks_key
from common.net.fault_kit import FaultKit
from common.net.faulty_redis import FaultyCacheEventPublisher, FaultyRegistry
from tests.common.net.test_cache_events import name, stored
from tests.common.test_membership import member
from tests.support.clients import until
from tests.support.redis import redis_server


def test_calls_fail_and_are_late_as_the_rules_say() -> None:
    slept: list[float] = []
    rules = "membership:fail peer=announce times=1;membership:delay ms=9 peer=members"
    with redis_server() as url:
        registry = FaultyRegistry(url, "test", FaultKit(rules, "decode-0", Log()), slept.append)
        with pytest.raises(redis.ConnectionError, match="injected failure: announce"):
            registry.announce(member("decode-0"))
        assert registry.members() == []
        registry.announce(member("decode-0"))
        assert [one.id for one in registry.members()] == ["decode-0"]
        registry.withdraw(member("decode-0"))
        registry.close()
    assert slept == [0.009] * 2


def test_cache_events_that_redis_did_not_take_come_later_and_are_whole() -> None:
    slept: list[float] = []
    rules = "membership:fail peer=publish times=2;membership:delay ms=9 peer=publish"
    kit = FaultKit(rules, "decode-0", Log())
    with redis_server() as url, closing(redis.Redis.from_url(url)) as reader:
        with closing(FaultyCacheEventPublisher(url, "test", member("decode-0"), kit, slept.append)) as publisher:
            publisher.publish([stored(1, 7), stored(2, 8)])
            key = blocks_key("test", peer_id(member("decode-0").id, member("decode-0").incarnation))
            until(lambda: reader.hget(key, name(8)) is not None, "the second block")
            assert reader.hget(key, name(7)) is not None
            assert publisher.failures_total == 2
    assert slept
