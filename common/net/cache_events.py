"""What one process caches, told through Redis to whoever routes by it: a stream of changes, and a snapshot.

    penstock:<cluster>:cache:<peer id>:events   stream, one entry per published batch, the oldest trimmed away
        id       <number of the batch's last event>-0, so that XRANGE from a number finds what came after it
        events   MessagePack list of CacheEvent
    penstock:<cluster>:cache:<peer id>:blocks   hash, the snapshot
        <16 bytes: name of a block>   its tiers, sorted, joined by commas: `device`, or `disk,host`
        number   the event up to which the snapshot is true; missing while it is being rewritten

Both belong to one life of a process and expire with its lease. An entry and the snapshot's share of it are written in one
transaction. The snapshot is never wrong for long: it is rewritten from the publisher's own picture whenever Redis lost it.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import redis
from msgspec.structs import replace
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from common.errors import ConfigError
from common.ids import PeerId, peer_id
from common.messages.cache_events import CacheEvent
from common.messages.liveness import Member
from common.net.redis import LEASE_MS, REFRESH_S

EVENTS_FIELD = b"events"
NUMBER_FIELD = b"number"
_SOCKET_TIMEOUT_S = 2.0
_PACE_S = 0.02  # what comes within it goes together: a worker has better uses for its interpreter
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0
_STREAM_ENTRIES = 10_000  # the length that Redis trims the stream to, about
_FIELDS_PER_WRITE = 5_000  # one transaction keeps every other client of Redis waiting
_REPEATED_ID = "equal or smaller"
_encode = msgspec.msgpack.Encoder().encode
Tiers = tuple[str, ...]
_RedisValue = bytes | bytearray | memoryview | str | int | float


def events_key(cluster: str, peer: PeerId) -> str:
    """Where the stream of one life of a process is."""
    return f"penstock:{cluster}:cache:{peer}:events"


def blocks_key(cluster: str, peer: PeerId) -> str:
    """Where the snapshot of one life of a process is."""
    return f"penstock:{cluster}:cache:{peer}:blocks"


@dataclass(slots=True)
class _Picture:
    """What is cached, and what of it Redis has not heard. Guarded by the publisher's lock."""

    tiers: dict[bytes, Tiers] = field(default_factory=dict)
    number: int = 0
    changed: dict[bytes, Tiers] = field(default_factory=dict)
    """Blocks to write since the last `take`; no tiers: to be removed."""
    batches: deque[tuple[CacheEvent, ...]] = field(default_factory=deque)
    n_queued: int = 0
    """Events in `batches`."""

    def apply(self, events: Sequence[CacheEvent]) -> None:
        """Take the next events. They are numbered here: a process with two tiers has a log, and numbers, for each."""
        batch: list[CacheEvent] = []
        for event in events:
            self.number += 1
            batch.append(event if event.number == self.number else replace(event, number=self.number))
            old = self.tiers.get(event.name, ())
            others = tuple(tier for tier in old if tier != event.tier)
            new = tuple(sorted((*others, event.tier))) if event.kind == "stored" else others
            if new:
                self.tiers[event.name] = new
            else:
                self.tiers.pop(event.name, None)
            self.changed[event.name] = new
        self.batches.append(tuple(batch))
        self.n_queued += len(batch)

    def trim(self, limit: int) -> int:
        """Drop the oldest batches, though never the newest one, down to `limit` events; returns the events dropped."""
        dropped = 0
        while self.n_queued - dropped > limit and len(self.batches) > 1:
            dropped += len(self.batches.popleft())
        self.n_queued -= dropped
        return dropped


@dataclass(frozen=True, slots=True)
class _Work:
    """One writing: `blocks` bring the snapshot to `number`."""

    batches: tuple[tuple[CacheEvent, ...], ...]
    blocks: Mapping[bytes, Tiers]
    number: int
    rewrite: bool


class CacheEventPublisher:
    """Writes one process's events from a thread of its own, until `close`.

    `publish` only queues. Past `limit` queued events the oldest batches are dropped: readers see a gap in the numbers and
    go back to the snapshot, which never loses any.
    """

    def __init__(self, url: str, cluster: str, member: Member, *, limit: int = 100_000) -> None:
        """`limit`: events that may wait for Redis. Does not need Redis to answer. Raises ConfigError for a bad `url`."""
        peer = peer_id(member.id, member.incarnation)
        self._events_key, self._blocks_key = events_key(cluster, peer), blocks_key(cluster, peer)
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=_SOCKET_TIMEOUT_S,
                socket_connect_timeout=_SOCKET_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # the thread retries by itself, and `close` must not wait for it
            )
        except ValueError as error:
            raise ConfigError(f"redis={url!r} is no address such as redis://127.0.0.1:6379/0: {error}") from error
        self._limit = limit
        self._lock = threading.Lock()
        self._picture = _Picture()
        self._awake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-events", daemon=True)
        self.published_total = 0
        """Events handed to `publish`."""
        self.dropped_total = 0
        """Events that readers will only see in the snapshot."""
        self.failures_total = 0
        """Writings that Redis did not take."""
        self._thread.start()

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """Tell of the next events, in order; they get this life's next numbers. Never waits for Redis, never raises for it."""
        if not events:
            return
        with self._lock:
            self._picture.apply(events)
            self.published_total += len(events)
            self.dropped_total += self._picture.trim(self._limit)
        self._awake.set()

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "cache_events_total": float(self.published_total),
            "cache_events_dropped_total": float(self.dropped_total),
            "cache_event_failures_total": float(self.failures_total),
        }

    def close(self) -> None:
        """Stop, and remove what was written; a Redis that does not answer is left to the lease."""
        self._stopping.set()
        self._awake.set()
        self._thread.join(timeout=3 * _SOCKET_TIMEOUT_S)
        try:
            self._redis.delete(self._events_key, self._blocks_key)
        except redis.RedisError:
            self.failures_total += 1
        self._redis.close()

    def _run(self) -> None:
        rewrite, retry_s = True, _FIRST_RETRY_S
        while not self._stopping.is_set():
            work = self._take(rewrite)
            try:
                rewrite = not self._write(work)  # Redis lost the snapshot: once more, now with all of it
                retry_s = _FIRST_RETRY_S
            except redis.RedisError:
                self.failures_total += 1
                self._give_back(work)
                rewrite = True  # nobody knows how much of it was done
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
            if not rewrite:
                self._awake.wait(REFRESH_S)
                self._awake.clear()
                self._stopping.wait(_PACE_S)

    def _take(self, rewrite: bool) -> _Work:
        with self._lock:
            one = self._picture
            blocks = dict(one.tiers) if rewrite else one.changed
            work = _Work(tuple(one.batches), blocks, one.number, rewrite)
            one.changed, one.n_queued = {}, 0
            one.batches.clear()
        return work

    def _give_back(self, work: _Work) -> None:
        with self._lock:
            one = self._picture
            one.batches.extendleft(reversed(work.batches))
            one.n_queued += sum(map(len, work.batches))
            self.dropped_total += one.trim(self._limit)

    def _write(self, work: _Work) -> bool:
        """Bring Redis up to `work`; False if the snapshot that it continues is gone. Raises redis.RedisError."""
        rows = list(work.blocks.items())
        parts = [rows[at : at + _FIELDS_PER_WRITE] for at in range(0, len(rows), _FIELDS_PER_WRITE)] or [[]]
        there = True
        for index, part in enumerate(parts):
            first, last = index == 0, index == len(parts) - 1
            pipe = self._redis.pipeline(transaction=True)
            pipe.exists(self._blocks_key)
            if first and work.rewrite:
                pipe.delete(self._blocks_key)
            self._add_fields(pipe, part)
            if last:
                self._add_end(pipe, work)
            pipe.pexpire(self._blocks_key, LEASE_MS)
            pipe.pexpire(self._events_key, LEASE_MS)
            there &= _checked(pipe.execute(raise_on_error=False)) or (first and work.rewrite)
        return there

    def _add_fields(self, pipe: "redis.client.Pipeline", rows: Sequence[tuple[bytes, Tiers]]) -> None:
        kept: dict[_RedisValue, _RedisValue] = {name: ",".join(tiers) for name, tiers in rows if tiers}
        gone = [name for name, tiers in rows if not tiers]
        if kept:
            pipe.hset(self._blocks_key, mapping=kept)
        if gone:
            pipe.hdel(self._blocks_key, *gone)

    def _add_end(self, pipe: "redis.client.Pipeline", work: _Work) -> None:
        pipe.hset(self._blocks_key, NUMBER_FIELD, work.number)
        for batch in work.batches:
            pipe.xadd(
                self._events_key,
                {EVENTS_FIELD: _encode(batch)},
                id=f"{batch[-1].number}-0",
                maxlen=_STREAM_ENTRIES,
                approximate=True,
            )


def _checked(answers: Sequence[object]) -> bool:
    """Whether the snapshot was there. Raises the first real error; an entry that is there already is none."""
    for answer in answers:
        if isinstance(answer, ResponseError) and _REPEATED_ID in str(answer):
            continue
        if isinstance(answer, Exception):
            raise answer
    return bool(answers[0])
