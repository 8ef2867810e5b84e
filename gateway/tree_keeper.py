"""The prompt tree on the gateway's event loop: takes what the feed's thread reads, a little between two other things."""

import asyncio
from collections.abc import Sequence

from common.clock import Clock
from common.messages.liveness import Member
from common.net.cache_reader import CacheReader
from common.net.redis_outage import RedisOutage
from gateway.core.prompt_tree import News, PromptTree
from gateway.tree_feed import TreeFeed

_SLICE_EVENTS = 1_000  # half a millisecond: a token may wait behind it
_TICK_S = 0.1
_SETTLE_MS = 2_000.0  # a gateway without Redis serves all the same, a little later


class TreeKeeper:
    """Owns the feed and the tree's clock. Started and stopped on the event loop; `on_members` may come from any thread."""

    def __init__(self, tree: PromptTree, reader: CacheReader, clock: Clock, outage: RedisOutage) -> None:
        """`outage`: hears whether Redis answers the feed."""
        self._tree, self._clock = tree, clock
        self._feed = TreeFeed(reader, clock, self._hand_over, lambda: tree.backlog_events, outage)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._applying = False
        self._started_ms: float | None = None
        self._settled = False

    def start(self) -> None:
        """Begin to read and to tick. Call on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._feed.start()
        self._started_ms = self._clock.now_ms()
        self._tick()

    async def stop(self) -> None:
        """End the feed's thread. The tree stays as it is."""
        await asyncio.to_thread(self._feed.stop)
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._loop = None

    def on_members(self, members: list[Member]) -> None:
        """The membership was read."""
        self._feed.set_members(members)

    def _hand_over(self, news: Sequence[News]) -> None:
        """In the feed's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take, news)

    def _take(self, news: Sequence[News]) -> None:
        for one in news:
            self._tree.put(one)
        self._apply_soon()

    def _apply_soon(self) -> None:
        if not self._applying and self._loop is not None and not self._tree.idle:
            self._applying = True
            self._loop.call_soon(self._apply)

    def _apply(self) -> None:
        self._applying = False
        for peer in sorted(self._tree.apply_some(_SLICE_EVENTS, self._clock.now_ms())):
            self._feed.resync(peer)
        self._apply_soon()  # until nothing is left, with other work of the loop in between

    def _tick(self) -> None:
        if self._loop is not None:
            self._tick_timer = self._loop.call_later(_TICK_S, self._tick)
            self._tree.on_tick(self._clock.now_ms())

    @property
    def settled(self) -> bool:
        """Whether the tree was complete once, or has had its time: before that a gateway would route blindly."""
        now_ms = self._clock.now_ms()
        late = self._started_ms is not None and now_ms - self._started_ms > _SETTLE_MS
        self._settled = self._settled or late or self._tree.synced(now_ms)
        return self._settled

    @property
    def outage(self) -> RedisOutage:
        """Whether Redis answers the feed."""
        return self._feed.outage

    def counters(self) -> dict[str, float]:
        """Totals since start, Prometheus names without prefix."""
        tree, feed = self._tree, self._feed
        return {
            "tree_events_total": float(tree.events_total),
            "tree_repeats_total": float(tree.repeats_total),
            "tree_resyncs_total": float(tree.resyncs_total),
            "tree_gaps_total": float(tree.gaps_total),
            "tree_expired_total": float(tree.expired_total),
            "tree_snapshots_total": float(feed.snapshots_total),
            "tree_feed_failures_total": float(feed.failures_total),
        }

    def gauges(self) -> dict[str, float]:
        """Values that rise and fall."""
        tree, feed = self._tree, self._feed
        return {
            "tree_blocks": float(tree.blocks),
            "tree_holders": float(tree.holders),
            "tree_lag_events": float(tree.lag_events(feed.published)),
            "tree_backlog_events": float(tree.backlog_events),
            "tree_connected": float(feed.connected),
            "tree_synced": float(tree.synced(self._clock.now_ms())),
        }
