"""Reads what common.net.cache_events writes: the snapshot first, then the events after its number.

    snapshot = read_snapshot(client, cluster, peer)
    news = read_events(client, cluster, peer, snapshot.number)
    ...
    news.gap: some events are lost; read the snapshot again and go on from its number

Applying events that the snapshot holds already, or twice, changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import redis

from common.ids import PeerId
from common.messages.cache_events import CacheEvent
from common.net.cache_events import EVENTS_FIELD, NUMBER_FIELD, blocks_key, events_key
from common.net.redis import undecoded

_decode = msgspec.msgpack.Decoder(tuple[CacheEvent, ...]).decode


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one process caches, true up to the event `number`."""

    number: int
    blocks: Mapping[bytes, tuple[str, ...]]
    """Hash of a block -> its tiers."""


@dataclass(frozen=True, slots=True)
class News:
    """Events in order, without a hole between them."""

    events: tuple[CacheEvent, ...]
    gap: bool
    """True: after the last one, or before the first, some are lost for good."""


def read_snapshot(client: "redis.Redis", cluster: str, peer: PeerId) -> Snapshot | None:
    """None if there is none: the process is gone, has just started, or is rewriting it. Raises redis.RedisError.

    Cost: the whole hash in one answer. `client` must not decode answers.
    """
    fields = dict(client.hgetall(blocks_key(cluster, peer)))
    number = fields.pop(NUMBER_FIELD, None)
    if number is None:
        return None
    return Snapshot(
        int(number), {undecoded(name): tuple(undecoded(tiers).decode().split(",")) for name, tiers in fields.items()}
    )


def read_events(
    client: "redis.Redis", cluster: str, peer: PeerId, after_number: int, *, max_batches: int = 1_000
) -> News:
    """What came after the event `after_number`; nothing and no gap if that was the newest. Raises redis.RedisError."""
    pipe = client.pipeline(transaction=True)
    pipe.xrange(events_key(cluster, peer), min=f"{after_number + 1}-0", count=max_batches)
    pipe.hget(blocks_key(cluster, peer), NUMBER_FIELD)
    entries, newest = pipe.execute()
    found: list[CacheEvent] = []
    number = after_number
    for _, fields in entries:
        for event in _events(fields):
            if event.number > number + 1:
                return News(tuple(found), gap=True)
            if event.number == number + 1:
                found.append(event)
                number += 1
    all_read = len(entries) < max_batches
    return News(tuple(found), gap=all_read and newest is not None and int(newest) != number)


def _events(fields: Mapping[bytes, bytes]) -> tuple[CacheEvent, ...]:
    """The events of one entry; none if it cannot be read, which shows as a gap."""
    try:
        return _decode(fields[EVENTS_FIELD])
    except (KeyError, msgspec.MsgspecError):
        return ()
