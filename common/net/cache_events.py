"""What every process caches, told through Redis to whoever routes by it: a stream of changes, and a snapshot of each process.

    penstock:<cluster>:events:<model name>   stream of all workers of that model, the oldest entries trimmed away
    penstock:<cluster>:events:*              the same of KV stores, which keep blocks of any model
        peer     whose events these are: one life of a process
        first    number of the first event
        last     number of the last one
        events   MessagePack list of CacheEvent
    penstock:<cluster>:cache:<peer id>:blocks   hash, the snapshot of one life
        <16 bytes: name of a block>   its tiers, sorted, joined by commas: `device`, or `disk,host`
        number   the event up to which the snapshot is true; missing while it is being rewritten
        written  how often it was begun anew, written at that moment only: a snapshot that Redis lost since has none

The snapshot expires with the process's lease, a stream some time after its last writer. Entries and the snapshot's share of them
are written in one transaction. Numbers, not entry ids, say what is new: a writing whose answer was lost is sent again, and its
repeats change nothing. The snapshot is never wrong for long: it is rewritten from the publisher's own picture whenever Redis
lost it.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import msgspec
import redis
from msgspec.structs import replace

from common.ids import PeerId, peer_id
from common.messages.cache_events import CacheEvent, Tiers
from common.messages.liveness import Member
from common.net.redis import LEASE_MS, REFRESH_S, is_wrong_type
from common.net.redis_address import SOCKET_TIMEOUT_S, connect_redis

PEER_FIELD, FIRST_FIELD, LAST_FIELD, EVENTS_FIELD = b"peer", b"first", b"last", b"events"
NUMBER_FIELD, WRITTEN_FIELD = b"number", b"written"
STREAM_TTL_MS = 60_000
"""How long a stream outlives its last writer. Readers that were away longer need the snapshots anyway."""
_PACE_S = 0.02  # what comes within it goes together: a worker has better uses for its interpreter
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0
_STREAM_ENTRIES = 4_000  # the length that Redis trims a stream to, about
_EVENTS_PER_ENTRY = 500  # bounds a stream's memory, and what a reader must take at once
_FIELDS_PER_WRITE = 5_000  # one transaction keeps every other client of Redis waiting
_encode = msgspec.msgpack.Encoder().encode
_RedisValue = bytes | bytearray | memoryview | str | int | float


def events_key(cluster: str, model_name: str | None) -> str:
    """Where the stream of a model's workers is; None: of the KV stores."""
    return f"penstock:{cluster}:events:{'*' if model_name is None else model_name}"


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
class Work:
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
        self._peer, self._blocks_key = peer, blocks_key(cluster, peer)
        self._events_key = events_key(cluster, None if member.model is None else member.model.name)
        self._redis = connect_redis(url, retries=False)  # the thread retries, and `close` must not wait for it
        self._limit = limit
        self._lock = threading.Lock()
        self._picture = _Picture()
        self._rewrites = 0
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
        """Stop, and remove the snapshot; a Redis that does not answer is left to the lease."""
        self._stopping.set()
        self._awake.set()
        self._thread.join(timeout=3 * SOCKET_TIMEOUT_S)
        try:
            self._redis.delete(self._blocks_key)
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
            except redis.RedisError as error:
                self.failures_total += 1
                self._give_back(work)
                rewrite = True  # nobody knows how much of it was done
                if isinstance(error, redis.ResponseError) and is_wrong_type(error):
                    drop_strange(self._redis, [(self._events_key, b"stream"), (self._blocks_key, b"hash")])
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
            if not rewrite:
                self._awake.wait(REFRESH_S)
                self._awake.clear()
                self._stopping.wait(_PACE_S)

    def _take(self, rewrite: bool) -> Work:
        with self._lock:
            one = self._picture
            blocks = dict(one.tiers) if rewrite else one.changed
            work = Work(tuple(one.batches), blocks, one.number, rewrite)
            one.changed, one.n_queued = {}, 0
            one.batches.clear()
        return work

    def _give_back(self, work: Work) -> None:
        with self._lock:
            one = self._picture
            one.batches.extendleft(reversed(work.batches))
            one.n_queued += sum(map(len, work.batches))
            self.dropped_total += one.trim(self._limit)

    def _write(self, work: Work) -> bool:
        """Bring Redis up to `work`; False if the snapshot that it continues is gone. Raises redis.RedisError."""
        rows = list(work.blocks.items())
        parts = [rows[at : at + _FIELDS_PER_WRITE] for at in range(0, len(rows), _FIELDS_PER_WRITE)] or [[]]
        self._rewrites += work.rewrite
        there = True
        for index, part in enumerate(parts):
            first, last = index == 0, index == len(parts) - 1
            pipe = self._redis.pipeline(transaction=True)
            pipe.hexists(self._blocks_key, WRITTEN_FIELD)  # what others put in its place has none
            if first and work.rewrite:
                pipe.delete(self._blocks_key)
                pipe.hset(self._blocks_key, WRITTEN_FIELD, self._rewrites)
            self._add_fields(pipe, part)
            if last:
                self._add_end(pipe, work)
            pipe.pexpire(self._blocks_key, LEASE_MS)
            pipe.pexpire(self._events_key, STREAM_TTL_MS)
            there &= bool(pipe.execute()[0]) or (first and work.rewrite)
        return there

    def _add_fields(self, pipe: "redis.client.Pipeline", rows: Sequence[tuple[bytes, Tiers]]) -> None:
        kept: dict[_RedisValue, _RedisValue] = {name: ",".join(tiers) for name, tiers in rows if tiers}
        gone = [name for name, tiers in rows if not tiers]
        if kept:
            pipe.hset(self._blocks_key, mapping=kept)
        if gone:
            pipe.hdel(self._blocks_key, *gone)

    def _add_end(self, pipe: "redis.client.Pipeline", work: Work) -> None:
        pipe.hset(self._blocks_key, NUMBER_FIELD, work.number)
        for events in _entries(work.batches):
            fields: dict[_RedisValue, _RedisValue] = {
                PEER_FIELD: self._peer,
                FIRST_FIELD: events[0].number,
                LAST_FIELD: events[-1].number,
                EVENTS_FIELD: _encode(events),
            }
            pipe.xadd(self._events_key, fields, maxlen=_STREAM_ENTRIES, approximate=True)


def drop_strange(client: "redis.Redis", wanted: Sequence[tuple[str, bytes]]) -> None:
    """Delete keys of ours that hold another type of value than theirs. Redis may fail again: then the next try does it."""
    with suppress(redis.RedisError):
        for key, kind in wanted:
            if client.type(key) not in (kind, b"none"):
                client.delete(key)


def _entries(batches: Sequence[Sequence[CacheEvent]]) -> Iterator[Sequence[CacheEvent]]:
    """The same events, cut as they go into the stream. Where some were dropped, an entry has fewer than its numbers say."""
    events = tuple(chain.from_iterable(batches))
    for at in range(0, len(events), _EVENTS_PER_ENTRY):
        yield events[at : at + _EVENTS_PER_ENTRY]
