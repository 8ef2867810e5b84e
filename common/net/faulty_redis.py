"""Calls to Redis that meet the fault kit."""

import time
from collections.abc import Callable

import redis

from common.faults.points import Kind, Point, Side
from common.messages.liveness import Member
from common.net.cache_events import CacheEventPublisher, Work
from common.net.fault_kit import FaultKit
from common.net.redis import Registry


class FaultyRegistry(Registry):
    """Each call strikes `membership`, with its own name as the peer: `announce`, `members` or `withdraw`."""

    def __init__(self, url: str, cluster: str, kit: FaultKit, sleep: Callable[[float], None] = time.sleep) -> None:
        """As Registry. `sleep` takes seconds."""
        super().__init__(url, cluster)
        self._kit, self._sleep = kit, sleep

    def announce(self, member: Member) -> None:
        """As Registry, with faults."""
        self._strike("announce")
        super().announce(member)

    def members(self) -> list[Member]:
        """As Registry, with faults."""
        self._strike("members")
        return super().members()

    def withdraw(self, member: Member) -> None:
        """As Registry, with faults."""
        self._strike("withdraw")
        super().withdraw(member)

    def _strike(self, call: str) -> None:
        _strike(self._kit, call, self._sleep)


class FaultyCacheEventPublisher(CacheEventPublisher):
    """Each writing strikes `membership`, with `publish` as the peer."""

    def __init__(
        self, url: str, cluster: str, member: Member, kit: FaultKit, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """As CacheEventPublisher. `sleep` takes seconds."""
        self._kit, self._sleep = kit, sleep  # first: the thread begins at once
        super().__init__(url, cluster, member)

    def _write(self, work: Work) -> bool:
        _strike(self._kit, "publish", self._sleep)
        return super()._write(work)


def _strike(kit: FaultKit, call: str, sleep: Callable[[float], None]) -> None:
    outcome = kit.strike(Point.MEMBERSHIP, Side.WORK, call)
    late_ms = outcome.ms_of(Kind.DELAY)
    if late_ms:
        sleep(late_ms / 1000)
    if outcome.has(Kind.FAIL, Kind.CUT):
        raise redis.ConnectionError(f"injected failure: {call}")


def opens_registry(kit: FaultKit | None) -> Callable[[str, str], Registry]:
    """What a Membership opens its registry with."""
    return Registry if kit is None else lambda url, cluster: FaultyRegistry(url, cluster, kit)


def open_publisher(url: str, cluster: str, member: Member, kit: FaultKit | None) -> CacheEventPublisher:
    """Of one process's cache events."""
    if kit is None:
        return CacheEventPublisher(url, cluster, member)
    return FaultyCacheEventPublisher(url, cluster, member, kit)
