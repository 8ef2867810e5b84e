"""Membership in Redis: each process keeps its Member record alive under a lease and reads everybody else's.

Redis is advice: with it slow or down, a process keeps the members it knew (their liveness is then a matter of
Ping and Report), counts the failure, and announces itself again when Redis is back.

    penstock:<cluster>:member:<worker id>   MessagePack Member, expires with the lease
    penstock:<cluster>:members              set of worker ids that may have a record
"""

import threading
from collections.abc import Callable, Sequence

import msgspec
import redis

from common.errors import ConfigError
from common.log import Log
from common.messages.liveness import Member, difference
from common.net.redis_address import SOCKET_TIMEOUT_S, connect_redis, shown
from common.net.redis_outage import RedisOutage

LEASE_MS = 3_000
REFRESH_S = 0.5
_IDS_PER_READ = 1_000
_MOST_RECORD_BYTES = 65_536
_decode_member = msgspec.msgpack.Decoder(Member).decode
_encode = msgspec.msgpack.Encoder().encode


class Registry:
    """One connection to the membership of one cluster. Calls raise redis.RedisError when Redis does not answer."""

    def __init__(self, url: str, cluster: str) -> None:
        """Raises ConfigError for a bad `url`."""
        self._redis = connect_redis(url)
        self._prefix = f"penstock:{cluster}"

    def announce(self, member: Member) -> None:
        """Write or renew this process's record, unless a newer life of that name has written its own.

        One that was stopped for long would write over its successor's at every turn, and the cluster would see both come
        and go.
        """
        there = self._there(member)
        if there is not None and there.is_newer_than(member):
            return
        pipe = self._redis.pipeline(transaction=True)
        pipe.set(self._key(member.id), _encode(member), px=LEASE_MS)
        pipe.sadd(f"{self._prefix}:members", member.id)
        try:
            pipe.execute()
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._redis.delete(f"{self._prefix}:members")  # whatever lies there, it is no list of members
            self._redis.sadd(f"{self._prefix}:members", member.id)

    def members(self) -> list[Member]:
        """Everybody whose lease is alive, by id. Records that cannot be read, or are another's, are skipped."""
        try:
            ids = sorted(undecoded(name) for name in self._redis.smembers(f"{self._prefix}:members"))
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            return []  # the next one that announces itself puts that right
        found: list[Member] = []
        gone: list[bytes] = []
        for at in range(0, len(ids), _IDS_PER_READ):
            part = ids[at : at + _IDS_PER_READ]
            for name, record in zip(part, self._redis.mget([self._key(name) for name in part]), strict=True):
                if record is None:
                    gone.append(name)
                elif (member := _member(undecoded(record))) is not None and member.id.encode() == name:
                    found.append(member)
        if gone:
            self._redis.srem(f"{self._prefix}:members", *gone)
        return found

    def withdraw(self, member: Member) -> None:
        """Remove this process's record, unless a newer incarnation wrote it."""
        there = self._there(member)
        if there is not None and there.incarnation == member.incarnation:
            self._redis.delete(self._key(member.id))

    def _there(self, member: Member) -> Member | None:
        """The record under the member's name, if it can be read."""
        try:
            record = self._redis.get(self._key(member.id))
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            return None
        return None if record is None else _member(undecoded(record))

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def _key(self, name: str | bytes) -> bytes:
        return f"{self._prefix}:member:".encode() + (name if isinstance(name, bytes) else name.encode())


def _member(record: bytes) -> Member | None:
    """None for what is no record, or too large to be one."""
    if len(record) > _MOST_RECORD_BYTES:
        return None
    try:
        return _decode_member(record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def is_wrong_type(error: redis.ResponseError) -> bool:
    """Whether somebody has put another kind of value under one of our keys."""
    return "WRONGTYPE" in str(error)


def undecoded(reply: bytes | str) -> bytes:
    """A reply as it came; the client was not told to decode any."""
    if isinstance(reply, str):
        raise TypeError(f"Redis replies must come undecoded: {reply!r}")
    return reply


def refuse_misfit(mine: Member, others: Sequence[Member]) -> None:
    """Raise ConfigError if this process cannot live beside an older member of its cluster.

    Two workers of one model name must agree in every field of ModelIdentity. Of two that join together,
    the one with the later (join time, incarnation) gives way.
    """
    for other in others:
        if other.incarnation == mine.incarnation or mine.model is None or other.model is None:
            continue
        older = (other.joined_unix_ms, other.incarnation) < (mine.joined_unix_ms, mine.incarnation)
        if older and other.model.name == mine.model.name and (rows := difference(mine.model, other.model)):
            raise ConfigError(f"{mine.id} does not fit {other.id}, which serves {other.model.name!r} already: {rows}")


class Membership:
    """Keeps one Member alive and reports the others, from a thread of its own, until `stop`.

    `on_members` runs in that thread after every successful reading; it must only pass the list on.
    """

    def __init__(
        self,
        url: str,
        cluster: str,
        member: Member,
        on_members: Callable[[list[Member]], None],
        open_registry: Callable[[str, str], Registry] = Registry,
    ) -> None:
        self._url, self._registry, self._member = url, open_registry(url, cluster), member
        self._on_members = on_members
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self.failures_total = 0
        self.outage = RedisOutage(Log(process=member.id), url, "membership")
        """Told from its thread; the log has a line when Redis is lost, and one when it is back."""

    def join(self) -> None:
        """Announce, check the fit, start renewing. Raises ConfigError (no Redis, or a misfit)."""
        try:
            self._registry.announce(self._member)
            members = self._registry.members()
        except redis.RedisError as error:
            raise ConfigError(f"redis={shown(self._url)!r} does not answer: {error}") from error
        try:
            refuse_misfit(self._member, members)
        except ConfigError:
            self._registry.withdraw(self._member)
            raise
        self._on_members(members)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(REFRESH_S):
            try:
                self._registry.announce(self._member)
                self._on_members(self._registry.members())
                self.outage.answered()
            except redis.RedisError as error:
                self.outage.failed(f"{type(error).__name__}: {error}")
                self.failures_total += 1  # the members known so far stay; the next round tries again

    def stop(self) -> None:
        """Stop renewing and withdraw the record; a Redis that does not answer is left to the lease."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * SOCKET_TIMEOUT_S + 1)
        try:
            self._registry.withdraw(self._member)
        except redis.RedisError:
            self.failures_total += 1
        self._registry.close()
