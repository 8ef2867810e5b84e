"""What the kernel knows of the processes of a pure world: who is stopped, who maps whose memory, and who is told of it.

The end of a mapping is news, at once or a little later, and always before what the same peer says afterwards; what a
process said before it died may be heard first, and its memory be written to in vain.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.ids import PeerId
from tests.support.world_cluster import Link

if TYPE_CHECKING:
    from tests.support.world_faults import FaultyWorld


@dataclass
class Standing:
    """Whether a process runs, and what its kernel will tell it, in order."""

    stopped: bool = False
    ran_since_ms: float = 0.0
    news: deque[tuple[float, str, PeerId]] = field(default_factory=deque)


class Kernel:
    """Owns the standings and the mappings."""

    def __init__(self, world: FaultyWorld) -> None:
        self._world = world
        self.standing: dict[PeerId, Standing] = {}
        self._mapped: dict[Link, None] = {}

    def spawn(self, peer: PeerId) -> None:
        self.standing[peer] = Standing()
        self._world.say(peer, "", "starts")

    def runs(self, peer: PeerId) -> bool:
        return self._world.lives_on(peer) and peer in self.standing and not self.standing[peer].stopped

    def stop(self, peer: PeerId) -> None:
        self.standing[peer].stopped = True
        self._world.say(peer, "", "is stopped")

    def go_on(self, peer: PeerId) -> None:
        """Its other threads may be quicker than the one that hears the news."""
        world, standing = self._world, self.standing[peer]
        late_ms = world.now_ms + world.rng.choice((0.0, 1.0, 30.0))
        standing.ran_since_ms, standing.stopped = world.now_ms, False
        standing.news = deque((max(due, late_ms), what, whom) for due, what, whom in standing.news)
        world.say(peer, "", "goes on")

    # -- mappings

    def map(self, guest: PeerId, host: PeerId) -> None:
        self._mapped[guest, host] = None
        self._tell(host, "joined", guest)

    def unmap(self, guest: PeerId, host: PeerId) -> None:
        """If it is mapped."""
        if (guest, host) in self._mapped:
            del self._mapped[guest, host]
            self._tell(host, "gone", guest)

    def bury(self, peer: PeerId) -> None:
        """Who shared memory with it is told."""
        for guest, host in [link for link in self._mapped if peer in link]:
            self._mapped.pop((guest, host), None)
            self._tell(*((host, "gone") if guest == peer else (guest, "lost")), peer)

    def maps_in_vain(self, guest: PeerId, dead: PeerId) -> bool:
        """Whether the guest has not heard yet that the memory it maps is a dead process's."""
        return any(what == "lost" and whom == dead for _, what, whom in self.standing[guest].news)

    # -- news

    def _tell(self, peer: PeerId, what: str, about: PeerId) -> None:
        """There is news for a process; of an end not always at once."""
        world = self._world
        if world.lives_on(peer):
            news = self.standing[peer].news
            due_ms = world.now_ms + (world.rng.choice((0.0, 0.0, 1.0, 30.0)) if what != "joined" else 0.0)
            if (due_ms, what, about) not in news:
                news.append((due_ms, what, about))

    def due_ms(self) -> list[float]:
        """When each process has news next."""
        return [one.news[0][0] for one in self.standing.values() if one.news]

    def hear_news(self, peer: PeerId, about: PeerId | None = None) -> None:
        """All that is due; all there is if `about` speaks next."""
        now_ms, news = self._world.now_ms, self.standing[peer].news
        while self.runs(peer) and news and (news[0][0] <= now_ms or any(_precedes(one, about) for one in news)):
            _, what, whom = news.popleft()
            if what != "joined":
                self._world.say(peer, "", f"hears that {whom} {'maps it' if what == 'gone' else 'is mapped'} no more")
            self._hear(peer, what, whom)

    def _hear(self, peer: PeerId, what: str, whom: PeerId) -> None:
        world, process, store = self._world, self._world.process(peer), self._world.store
        if process is not None and what == "gone":
            world.perform(process, process.core.on_peer_dead(whom, world.now_ms))
        elif process is not None and what == "lost":
            world.perform(process, process.core.on_peer_lost(whom, world.now_ms))
        elif process is not None:
            world.perform(process, process.core.on_peer_joined(whom))
        elif store is not None and what == "gone":
            store.core.on_peer_dead(whom)
        elif store is not None:
            store.core.on_peer_joined(whom, world.now_ms)


def _precedes(news: tuple[float, str, PeerId], speaker: PeerId | None) -> bool:
    """Whether it is heard before what the speaker says: it did that afterwards. The dead say nothing afterwards."""
    return news[2] == speaker and news[1] != "lost"
