"""Reads what common.net.cache_events writes, for one gateway: its model's stream and the KV stores', and snapshots.

    reader = CacheReader(url, cluster, model_name)
    reader.numbers(peers)             takes the place in the streams: before any snapshot, so that nothing falls between
    reader.snapshot(peer, between)
    reader.read(block_ms)             what came after it
    reader.caught_up                  everything that `numbers` told of has been read, or is lost

Nothing here remembers what was applied: numbers of events say what is new, and whoever applies them sees the gaps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

from common.block_hash import HASH_BYTES
from common.ids import PeerId
from common.messages.cache_events import TIERS, CacheBatch, CacheEvent, CacheSnapshot, Tiers
from common.net.cache_events import (
    EVENTS_FIELD,
    FIRST_FIELD,
    LAST_FIELD,
    NUMBER_FIELD,
    PEER_FIELD,
    WRITTEN_FIELD,
    blocks_key,
    drop_strange,
    events_key,
)
from common.net.redis import is_wrong_type, undecoded
from common.net.redis_address import connect_redis

# What one answer may hold: Redis and this interpreter have others to serve in between, and one of them streams tokens.
_READ_ENTRIES = 10  # of one stream
_SCAN_FIELDS = 300  # of a snapshot, about
_MARKS = (NUMBER_FIELD, WRITTEN_FIELD)  # a snapshot is whole while it has both, and one while the second stays
_KINDS = ("stored", "removed")
_START = (0, 0)
_decode = msgspec.msgpack.Decoder(tuple[CacheEvent, ...]).decode
EntryId = tuple[int, int]


class CacheUnreachable(Exception):
    """Redis did not answer, or not sensibly."""


class CacheReader:
    """One connection, for one thread. Owns the place in the streams. Calls raise CacheUnreachable."""

    def __init__(self, url: str, cluster: str, model_name: str) -> None:
        """Does not need Redis to answer. Raises ConfigError for a bad `url`."""
        self._redis = connect_redis(url, retries=False)  # who calls tries again, and its end must not wait for it
        self.model_name = model_name
        self._cluster = cluster
        self._after: dict[str, EntryId | None] = {
            events_key(cluster, model_name): None,
            events_key(cluster, None): None,
        }
        self._newest: dict[str, EntryId] = {}
        """Newest entries after `numbers` was read."""

    def numbers(self, peers: Sequence[PeerId]) -> dict[PeerId, int | None]:
        """The last number of each peer; None where no snapshot is complete. The first call begins at the streams' ends.

        Also goes back to the start of a stream whose ids lie before the place reached: another Redis has begun it, with a
        clock that is behind.
        """
        pipe = self._redis.pipeline(transaction=False)
        for peer in peers:
            pipe.hmget(blocks_key(self._cluster, peer), _MARKS)
        for key in self._after:  # after the numbers: their events are in the streams by then
            pipe.xrevrange(key, count=1)
        with _unreachable():
            answers = pipe.execute(raise_on_error=False)
            numbers = [_number(marks) for marks in answers[: len(peers)]]
            for key, entries in zip(list(self._after), answers[len(peers) :], strict=True):
                if isinstance(entries, redis.ResponseError):
                    self._drop(key, entries)
                    continue
                self._place(key, _entry_id(entries[0][0]) if entries else _START)
        return dict(zip(peers, numbers, strict=True))

    def _place(self, key: str, newest: EntryId) -> None:
        after = self._after[key]
        if after is None:
            self._after[key] = newest
        elif newest < after:
            self._after[key] = _START
        self._newest[key] = newest

    @property
    def caught_up(self) -> bool:
        """Whether everything up to the last `numbers` has been read."""
        return all((self._after[key] or _START) >= newest for key, newest in self._newest.items())

    def read(self, block_ms: int | None) -> list[CacheBatch]:
        """Entries after the place reached, oldest first. Waits up to `block_ms` for one; None: does not wait."""
        places: dict[bytes | str | memoryview, int | bytes | str | memoryview] = {
            key: "{}-{}".format(*(after or _START)) for key, after in self._after.items()
        }
        batches: list[CacheBatch] = []
        with _unreachable():
            answer: Any  # a dict or a list of pairs
            try:
                answer = self._redis.xread(places, count=_READ_ENTRIES, block=block_ms)
            except redis.ResponseError as error:
                for key in self._after:
                    self._drop(key, error)
                raise
            for key, entries in answer.items() if isinstance(answer, dict) else answer or ():
                for entry, fields in entries:
                    batch = _batch(fields)
                    if batch is not None:
                        batches.append(batch)
                    self._after[undecoded(key).decode()] = _entry_id(entry)
        return batches

    def _drop(self, key: str, error: redis.ResponseError) -> None:
        """One strange value must not hide the other stream: it goes. Raises `error` if that is not what is wrong."""
        if not is_wrong_type(error):
            raise error
        drop_strange(self._redis, [(key, b"stream")])

    def snapshot(self, peer: PeerId, between: Callable[[], bool]) -> CacheSnapshot | None:
        """None: there is none, it is being rewritten, or `between`, which runs after every slice of it, returned False.

        Reading takes many answers. Blocks that change meanwhile come out old or new; the events after `number`, applied in
        order, put that right.
        """
        key = blocks_key(self._cluster, peer)
        parts: list[tuple[Tiers, list[bytes]]] = []
        cursor = 0
        with _unreachable():
            try:
                before = self._redis.hmget(key, _MARKS)
            except redis.ResponseError as error:
                if is_wrong_type(error):
                    return None  # its publisher puts that right
                raise
            number = _number(before)
            if number is None:
                return None
            while True:
                answer: Any = self._redis.hscan(
                    key, cursor, count=_SCAN_FIELDS
                )  # the type also tells of an older protocol
                cursor, fields = answer
                parts += _by_tiers(fields)
                if cursor == 0:
                    break
                if not between():
                    return None
            after = self._redis.hmget(key, _MARKS)
        if after[0] is None or after[1] != before[1]:
            return None
        return CacheSnapshot(peer, number, parts)

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def _number(marks: Any) -> int | None:
    """Up to which event a snapshot is true; None if it is not whole, or is none. Raises what is wrong with Redis itself."""
    if isinstance(marks, redis.ResponseError) and is_wrong_type(marks):
        return None
    if isinstance(marks, Exception):
        raise marks
    try:
        return None if None in marks else int(marks[0])
    except ValueError:
        return None


@contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, ValueError) as error:
        raise CacheUnreachable(f"{type(error).__name__}: {error}") from error


def _entry_id(text: bytes | str) -> EntryId:
    time_ms, _, sequence = undecoded(text).partition(b"-")
    return int(time_ms), int(sequence)


def _batch(fields: Mapping[bytes, bytes]) -> CacheBatch | None:
    """One entry; without events if they cannot be read, which shows as a gap. None if not even its numbers can."""
    try:
        peer = PeerId(fields[PEER_FIELD].decode())
        first, last = int(fields[FIRST_FIELD]), int(fields[LAST_FIELD])
        if not 0 < first <= last < 2**63:
            return None
    except (KeyError, ValueError):
        return None
    try:
        events = _decode(fields[EVENTS_FIELD])
        known = all(event.kind in _KINDS and event.tier in TIERS for event in events)
        return CacheBatch(peer, first, last, events if known else ())
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return CacheBatch(peer, first, last, ())


def _by_tiers(fields: Mapping[bytes, bytes]) -> list[tuple[Tiers, list[bytes]]]:
    """Without the fields that name no block, and without what is no tier."""
    names: dict[bytes, list[bytes]] = {}
    for name, tiers in fields.items():
        if len(name) == HASH_BYTES:
            names.setdefault(tiers, []).append(name)
    found = [(_tiers(text), blocks) for text, blocks in names.items()]
    return [(tiers, blocks) for tiers, blocks in found if tiers]


def _tiers(text: bytes) -> Tiers:
    told = text.decode(errors="replace").split(",")
    return tuple(tier for tier in TIERS if tier in told)
