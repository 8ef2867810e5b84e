"""A process says once that Redis does not answer, and once that it does again."""

import json
import threading

import pytest
import redis

from common.ids import Incarnation, WorkerId
from common.log import Log
from common.messages.liveness import Member
from common.net.redis import Membership, Registry
from common.net.redis_outage import RedisOutage

_LIMIT_S = 20.0
_URL = "redis://user:secret@h/0"


def test_an_outage_is_two_lines_however_often_is_tried_and_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [10.0]
    outage = RedisOutage(Log(), _URL, "membership", lambda: now_s[0])
    outage.answered()
    assert outage.lost_s is None
    for _ in range(3):
        outage.failed("ConnectionError: refused")
        now_s[0] += 2.0
    assert outage.lost_s == 6.0
    outage.answered()
    outage.answered()
    assert outage.lost_s is None
    lost, back = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (lost["event"], lost["part"], lost["redis"]) == ("redis_lost", "membership", "redis://***@h/0")
    assert lost["why"] == "ConnectionError: refused"
    assert (back["event"], back["away_s"]) == ("redis_back", 6.0)


class Away(Registry):
    """Answers the first reading, then not for three, then again."""

    readings = 0

    def announce(self, member: Member) -> None:
        pass

    def withdraw(self, member: Member) -> None:
        pass

    def members(self) -> list[Member]:
        self.readings += 1
        if 2 <= self.readings <= 4:
            raise redis.ConnectionError("refused")
        return []


def test_a_membership_tells_when_it_loses_redis_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.net.redis.REFRESH_S", 0.001)
    registry, back = Away(_URL, "c"), threading.Event()
    mine = Member(id=WorkerId("decode-0"), role="decode", incarnation=Incarnation(1), endpoint="", host="", pid=1)

    def on_members(members: list[Member]) -> None:
        if registry.readings > 5:  # the line was written in the round before
            back.set()

    membership = Membership(_URL, "c", mine, on_members, lambda url, cluster: registry)
    membership.join()
    assert back.wait(_LIMIT_S)
    assert membership.outage.lost_s is None and membership.failures_total == 3
    membership.stop()
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(one["event"], one["process"]) for one in told] == [("redis_lost", "decode-0"), ("redis_back", "decode-0")]
