"""The global prompt tree: which worker and which KV store hold which blocks. Pure.

A block's name stands for its whole prefix (common/block_hash.py), so the tree is a map from names to holders, and a prompt is
a list of names. It is advice: a hit that is too high or too low costs a computation, never a token, because the worker's own
match is final.

Fed with news (snapshots, numbered batches, checks of the numbers) that `put` queues and `apply_some` works off in slices. A
holder enters with its first news or expectation. It leaves by `forget`, by a Gone, or after TTL_MS without a sign of it.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from common.block_hash import BlockHash
from common.ids import PeerId
from common.messages.cache_events import CacheBatch, CacheSnapshot, Tiers
from gateway.core.block_masks import BlockMasks
from gateway.core.expectations import Expectations
from gateway.core.prompt_match import EXPECTED, Holder, Match, segments

TTL_MS = 120_000.0
"""The safety net: how long an entry lives without a word from its holder."""
EXPECTED_MS = 2_500.0
"""An expectation lives so long, or up to twice as long; the holder's own event follows within milliseconds."""
EXPECTED_UNFED_MS = 60_000.0
"""The same while nobody confirms anything."""
SILENT_MS = 5_000.0
"""A feed that says nothing for so long is down."""
_KIND_AND_TIER, _NAME = attrgetter("kind", "tier"), attrgetter("name")
_MOST_AHEAD = 1_000_000  # events that may come between asking for a number and its answer; more were never told
_SWEEP_BLOCKS = 4_000  # a millisecond, every tick


@dataclass(frozen=True, slots=True)
class Gone:
    """A holder left the membership: nothing of it counts."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Checked:
    """Everything up to these numbers has been passed on. Also says that the feed works."""

    numbers: Mapping[PeerId, int | None]
    """Every member's last number; None for one that has told none."""


News = CacheBatch | CacheSnapshot | Gone | Checked


@dataclass(slots=True)
class _Loading:
    """A snapshot on its way into the map. It does not show before it is complete."""

    peer: PeerId
    holder: Holder
    number: int
    bits: dict[str, int]
    parts: deque[tuple[Tiers, Sequence[bytes]]]
    """Freed one by one: a million names freed at once would keep the loop for tens of milliseconds."""


class PromptTree:
    """Owns `_holders` and the map. Everything is called from one thread."""

    def __init__(self) -> None:
        self._masks, self._expected = BlockMasks(), Expectations()
        self._holders: dict[PeerId, Holder] = {}
        self._news: deque[News] = deque()
        self._loading: _Loading | None = None
        self._heard_ms: float | None = None
        self.backlog_events = 0
        """Events and blocks of snapshots that wait for `apply_some`."""
        self.events_total = 0
        self.repeats_total = 0
        """Batches that held nothing new."""
        self.resyncs_total = 0
        """Snapshots loaded, the first one of each holder included."""
        self.gaps_total = 0
        self.expired_total = 0
        """Holders that left because nothing was heard of them."""

    def match(self, names: Sequence[BlockHash]) -> Match:
        """Who holds what of a prompt. The cost depends on how many holders differ along it, not on the tree."""
        return Match(len(names), segments(names, self._look()), self._holders)

    def _look(self) -> Callable[[bytes], int]:
        shards, live = self._masks.shards, self._masks.live
        young, old = self._expected.young, self._expected.old
        if not young and not old:
            return lambda name: shards[name[0]].get(name, 0) & live
        return lambda name: (shards[name[0]].get(name, 0) | young.get(name, 0) | old.get(name, 0)) & live

    def expect(self, peer: PeerId, names: Sequence[BlockHash], now_ms: float) -> None:
        """A prompt was just routed there: for a few seconds these blocks of it count as cached on that worker's device."""
        holder = self._holders.setdefault(peer, Holder())
        holder.signed_ms = now_ms
        if names:
            self._expected.add(names, self._bit(holder, EXPECTED))

    def _bit(self, holder: Holder, tier: str) -> int:
        bit = holder.bits.get(tier)
        if bit is None:
            bit = holder.bits[tier] = self._masks.take()
            self._masks.show(bit)
        return bit

    def forget(self, peer: PeerId) -> None:
        """That life is over: nothing of it counts from now on. Unknown peers are ignored."""
        holder = self._holders.pop(peer, None)
        if holder is None:
            return
        expected = holder.bits.pop(EXPECTED, 0)
        self._expected.retire(expected)
        self._masks.live &= ~expected
        self._masks.retire(sum(holder.bits.values()))

    def put(self, news: News) -> None:
        """Queue news, in the order of the feed."""
        self._news.append(news)
        self.backlog_events += _weight(news)

    def apply_some(self, limit: int, now_ms: float) -> set[PeerId]:
        """Work off news: about `limit` events or blocks, up to one batch or part above it. Returns who needs a resync."""
        wanted: set[PeerId] = set()
        while limit > 0 and not self.idle:
            if self._loading is not None:
                limit -= self._load_some(self._loading, limit)
                continue
            news = self._news.popleft()
            match news:
                case CacheBatch():
                    self.backlog_events -= _weight(news)
                    limit -= _weight(news)
                    if self._gap_in(news, now_ms):
                        wanted.add(news.peer)
                case CacheSnapshot():
                    self._begin(news, now_ms)
                case Gone(peer):
                    self.forget(peer)
                case Checked(numbers):
                    wanted |= self._behind(numbers, now_ms)
        return wanted

    def _gap_in(self, batch: CacheBatch, now_ms: float) -> bool:
        """Apply a batch; True if something before or in it is lost. A holder without a snapshot waits for one."""
        holder = self._holders.get(batch.peer)
        if holder is None or not holder.synced:
            return False
        if batch.last <= holder.number:
            self.repeats_total += 1
            return False
        whole = len(batch.events) == batch.last - batch.first + 1
        gap = batch.first > holder.number + 1 or not whole
        self.gaps_total += gap
        for (kind, tier), run in groupby(
            batch.events, _KIND_AND_TIER
        ):  # old ones among them end where they ended before
            change = self._masks.add if kind == "stored" else self._masks.remove
            change(map(_NAME, run), self._bit(holder, tier))
        self.events_total += len(batch.events)
        holder.number, holder.signed_ms = batch.last, now_ms
        return gap

    def _behind(self, numbers: Mapping[PeerId, int | None], now_ms: float) -> set[PeerId]:
        """Who lacks events that will not come any more, or has no snapshot yet."""
        self._heard_ms = now_ms
        behind: set[PeerId] = set()
        for peer, number in numbers.items():
            if number is None:
                continue
            holder = self._holders.setdefault(peer, Holder())
            holder.signed_ms, holder.told = now_ms, True
            if not holder.synced:
                behind.add(peer)
            elif number > holder.number or holder.number - number > _MOST_AHEAD:
                self.gaps_total += 1
                holder.number = number  # said once
                behind.add(peer)
        return behind

    def _begin(self, snapshot: CacheSnapshot, now_ms: float) -> None:
        holder = self._holders.setdefault(snapshot.peer, Holder())
        holder.signed_ms = now_ms
        self._loading = _Loading(snapshot.peer, holder, snapshot.number, {}, deque(snapshot.parts))

    def _load_some(self, loading: _Loading, limit: int) -> int:
        done = 0
        while done < limit:
            if not loading.parts:
                self._end(loading)
                break
            tiers, names = loading.parts.popleft()
            for tier in tiers:
                if tier not in loading.bits:
                    loading.bits[tier] = self._masks.take()
            self._masks.add(names, sum(loading.bits[tier] for tier in tiers))
            done += len(names)
        self.backlog_events -= done
        return done

    def _end(self, loading: _Loading) -> None:
        """The snapshot is complete: its bits show, and those it replaces die, at once."""
        self._loading = None
        bits = loading.bits
        if self._holders.get(loading.peer) is not loading.holder:  # forgotten meanwhile
            self._masks.retire(sum(bits.values()))
            return
        holder = loading.holder
        kept = {EXPECTED: holder.bits.pop(EXPECTED)} if EXPECTED in holder.bits else {}
        self._masks.retire(sum(holder.bits.values()))
        self._masks.show(sum(bits.values()))
        holder.bits, holder.number, holder.synced = {**kept, **bits}, loading.number, True
        self.resyncs_total += 1

    @property
    def idle(self) -> bool:
        """Nothing waits for `apply_some`."""
        return self._loading is None and not self._news

    def on_tick(self, now_ms: float) -> None:
        """Let expectations fade, drop who has not been heard of for TTL_MS, sweep a slice."""
        period_ms = EXPECTED_MS if self.fed(now_ms) else EXPECTED_UNFED_MS
        self._masks.free(self._expected.turn(now_ms, period_ms))
        for peer in [peer for peer, holder in self._holders.items() if now_ms - holder.signed_ms > TTL_MS]:
            self.forget(peer)
            self.expired_total += 1
        self.sweep(_SWEEP_BLOCKS)

    def sweep(self, limit: int) -> int:
        """Give back the room of what is gone: look at up to `limit` blocks. Returns how many; 0: nothing to do."""
        return self._masks.sweep(limit)

    def fed(self, now_ms: float) -> bool:
        """Whether the feed has said something lately."""
        return self._heard_ms is not None and now_ms - self._heard_ms <= SILENT_MS

    def synced(self, now_ms: float) -> bool:
        """Whether the tree can be relied on: it is fed, and every holder's snapshot is loaded. Else answers are degraded."""
        return self.fed(now_ms) and all(holder.synced for holder in self._holders.values() if holder.told)

    def lag_events(self, published: Mapping[PeerId, int | None]) -> int:
        """Events that holders have told of and that do not count here yet."""
        lags = [number - self.number(peer) for peer, number in published.items() if number is not None]
        return sum(lag for lag in lags if lag > 0)

    def number(self, peer: PeerId) -> int:
        """The newest event of that peer that counts; 0 if none does."""
        holder = self._holders.get(peer)
        return 0 if holder is None else holder.number

    @property
    def blocks(self) -> int:
        """Names in the map, those not swept yet included."""
        return len(self._masks)

    @property
    def holders(self) -> int:
        """Lives that something is known of."""
        return len(self._holders)

    def check(self) -> None:
        """Conservation laws; walks over everything. Raises AssertionError."""
        self._masks.check()
        bits = [bit for holder in self._holders.values() for bit in holder.bits.values()]
        assert sum(bits) == self._masks.live, (bits, bin(self._masks.live))
        waiting = sum(map(_weight, self._news))
        assert self.backlog_events >= waiting, (self.backlog_events, waiting)
        assert self._loading is not None or self.backlog_events == waiting, (self.backlog_events, waiting)


def _weight(news: News) -> int:
    match news:
        case CacheBatch(events=events):
            return max(1, len(events))
        case CacheSnapshot(parts=parts):
            return sum(len(names) for _, names in parts)
    return 0
