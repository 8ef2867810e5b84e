"""A membership whose calls fail or are late, as those to a Redis that is ill."""

import pytest
import redis

from common.log import Log
from common.net.fault_kit import FaultKit
from common.net.faulty_redis import FaultyRegistry
from tests.common.test_membership import member
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
