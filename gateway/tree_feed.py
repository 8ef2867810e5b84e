"""Reads what workers and KV stores cache from Redis, in a thread of its own, for one gateway's prompt tree.

Redis slow, gone, emptied or restarted is no error here: the thread counts it and tries again, and the tree asks for a snapshot
of whomever it lacks events of. Nobody waits for this thread.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

from common.clock import Clock
from common.ids import PeerId, peer_id
from common.messages.cache_events import CacheBatch
from common.messages.liveness import Member
from common.net.cache_reader import CacheReader, CacheUnreachable
from common.net.redis_outage import RedisOutage
from gateway.core.prompt_tree import Checked, Gone, News

HOLDER_ROLES = frozenset({"prefill", "decode", "mixed", "kvstore"})
_BLOCK_MS = 200  # how long a quiet stream is waited on; orders and the end are noticed between two waits
_PAUSE_MS = 20  # the same while a snapshot is not there yet, or the event loop has enough to do
_CHECK_MS = 500.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0
_STOP_S = 10.0
_BACKLOG_EVENTS = 200_000  # read but not applied: what may wait in memory


class TreeFeed:
    """Owns its thread between `start` and `stop`. `set_members` and `resync` may be called from any thread."""

    def __init__(
        self,
        reader: CacheReader,
        clock: Clock,
        on_news: Callable[[Sequence[News]], None],
        backlog_events: Callable[[], int],
        outage: RedisOutage,
    ) -> None:
        """`on_news` runs in the thread and must only pass them on, in order; `backlog_events`: what is not applied yet.

        Closes `reader` at its end.
        """
        self._reader, self._clock, self._on_news, self._backlog_events = reader, clock, on_news, backlog_events
        self.outage = outage
        self._lock = threading.Lock()
        self._members: frozenset[PeerId] = frozenset()
        self._asked: set[PeerId] = set()
        self._known: dict[PeerId, None] = {}
        """Members as the thread has taken them, in order."""
        self._wanted: dict[PeerId, None] = {}
        """Whose snapshot is to be read."""
        self._scanning: PeerId | None = None
        self._held_back: list[CacheBatch] = []
        """Batches of `_scanning`: its snapshot goes first."""
        self._checked: Checked | None = None
        """Passed on as soon as everything before it has been read."""
        self._check_at_ms = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tree-feed", daemon=True)
        self.connected = False
        """Whether Redis answered last time."""
        self.published: Mapping[PeerId, int | None] = {}
        """The numbers that members told last."""
        self.batches_total = 0
        self.snapshots_total = 0
        self.failures_total = 0
        """Readings that Redis did not answer."""

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, within the time that Redis may take to answer. No news comes after that."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_STOP_S)

    def set_members(self, members: Sequence[Member]) -> None:
        """The membership was read: whose caches count from now on. Those who are missing are forgotten."""
        name = self._reader.model_name
        peers = frozenset(
            peer_id(member.id, member.incarnation)
            for member in members
            if member.role in HOLDER_ROLES and (member.model is None or member.model.name == name)
        )
        with self._lock:
            self._members = peers

    def resync(self, peer: PeerId) -> None:
        """Read that peer's snapshot again; ignored if it is no member any more."""
        with self._lock:
            self._asked.add(peer)

    def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._stopping.is_set():
            try:
                if self._round():
                    self.outage.answered()
                    self.connected, retry_s = True, _FIRST_RETRY_S
            except CacheUnreachable as error:
                self.outage.failed(str(error))
                self.connected, self._checked, self._check_at_ms = False, None, 0.0
                self.failures_total += 1
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
        self.connected = False
        self._reader.close()

    def _round(self) -> bool:
        """Whether Redis was asked, and answered."""
        self._take_orders()
        if self._backlog_events() > _BACKLOG_EVENTS:
            self._stopping.wait(_PAUSE_MS / 1e3)
            return False
        if self._checked is None and self._clock.now_ms() >= self._check_at_ms:
            self._check()
        for peer in list(self._wanted):
            self._read_snapshot(peer)
        if self._checked is not None:
            self._pass_on(self._reader.read(None))
            if self._reader.caught_up:
                self._on_news([self._checked])
                self._checked = None
        else:
            self._pass_on(self._reader.read(_PAUSE_MS if self._wanted else _BLOCK_MS))
        return True

    def _take_orders(self) -> None:
        with self._lock:
            members, asked, self._asked = self._members, self._asked, set()
        gone = [peer for peer in self._known if peer not in members]
        for peer in gone:
            del self._known[peer]
            self._wanted.pop(peer, None)
        if gone:
            self._on_news([Gone(peer) for peer in gone])
        new = [peer for peer in sorted(members) if peer not in self._known]
        self._known.update(dict.fromkeys(new))
        self._wanted.update(dict.fromkeys([*new, *sorted(asked & self._known.keys())]))

    def _check(self) -> None:
        """Ask for everybody's number: it shows what was lost with nothing after it, and that Redis is there."""
        numbers = self._reader.numbers(list(self._known))
        self._check_at_ms = self._clock.now_ms() + _CHECK_MS
        self._checked, self.published = Checked(numbers), numbers

    def _read_snapshot(self, peer: PeerId) -> None:
        self._scanning = peer
        try:
            snapshot = self._reader.snapshot(peer, self._between)
            if snapshot is not None:
                del self._wanted[peer]
                self.snapshots_total += 1
                self._on_news([snapshot])
        finally:
            self._scanning = None
            held_back, self._held_back = self._held_back, []
            self._pass_on(held_back)

    def _between(self) -> bool:
        """The streams are read on during a long snapshot, lest they be trimmed meanwhile."""
        self._pass_on(self._reader.read(None))
        return not self._stopping.is_set()

    def _pass_on(self, batches: Sequence[CacheBatch]) -> None:
        news = []
        for batch in batches:
            if batch.peer == self._scanning:
                self._held_back.append(batch)
            elif batch.peer in self._known:
                news.append(batch)
        if news:
            self.batches_total += len(news)
            self._on_news(news)
