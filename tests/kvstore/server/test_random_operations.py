"""Random operations against the core, with a plain model of what must be true, and every law checked after each step."""

import random
from dataclasses import dataclass, field

import pytest

from common.ids import PeerId
from common.messages.blocks import BlockName, Find, Found, Publish, Put, Release, Reserve, Reserved, Stored
from common.messages.cache_events import CacheEvent
from kvstore.server.core.actions import Action, DeleteDisk, Pages, ReadDisk, Reply, Write, WriteDisk
from kvstore.server.core.store import KvStoreCore
from tests.kvstore.server.builders import BLOCK_BYTES, FILE_BYTES, block, core

PEERS = [PeerId(f"worker-{number}@1") for number in range(3)]
CAPACITY_BLOCKS, DISK_BLOCKS, STEPS = 12, 10, 1500
Call = tuple[PeerId, int]


@dataclass
class Model:
    """Contents by page and by file, and who may rely on what."""

    page: dict[int, bytes] = field(default_factory=dict)
    file: dict[bytes, bytes] = field(default_factory=dict)
    writing: dict[Call, tuple[tuple[BlockName, ...], tuple[Pages, ...]]] = field(default_factory=dict)
    leased: dict[Call, tuple[float, tuple[bytes, ...], tuple[Pages, ...]]] = field(default_factory=dict)
    waiting: dict[Call, tuple[bytes, ...]] = field(default_factory=dict)
    jobs: list[WriteDisk | ReadDisk] = field(default_factory=list)
    cached: dict[str, set[bytes]] = field(default_factory=lambda: {"host": set(), "disk": set()})
    heard: int = 0

    def write(self, pages: Pages, content: bytes) -> None:
        held = {page for _, places in self.writing.values() for place in places for page in place}
        leased = {page for _, _, places in self.leased.values() for place in places for page in place}
        assert not leased & set(pages), "a leased page is written"
        assert not held & set(pages), "a reserved page is written by somebody else"
        self.page.update(dict.fromkeys(pages, content))

    def read(self, pages: Pages) -> bytes:
        (content,) = {self.page[page] for page in pages}
        return content

    def apply(self, event: CacheEvent) -> None:
        assert event.number == self.heard + 1
        self.heard = event.number
        if event.kind == "stored":
            assert event.name not in self.cached[event.tier]
            self.cached[event.tier].add(event.name)
        else:
            self.cached[event.tier].remove(event.name)


class World:
    """The core, its model, and a shell that performs disk jobs late, wrongly or not at all."""

    def __init__(self, seed: int) -> None:
        self.random, self.model, self.now_ms, self.calls = random.Random(seed), Model(), 0.0, 0
        self.core: KvStoreCore = core(CAPACITY_BLOCKS, disk_blocks=DISK_BLOCKS)
        for peer in PEERS:
            self.core.on_peer_joined(peer, 0.0)

    def call(self) -> tuple[PeerId, int]:
        self.calls += 1
        return self.random.choice(PEERS), self.calls

    def run_of_blocks(self) -> tuple[BlockName, ...]:
        """A stretch of one of four chains of ten blocks."""
        base, first = 100 * self.random.randrange(4), self.random.randrange(6)
        last = self.random.randrange(first, 10)
        return tuple(block(base + place + 1, base + place if place else 0, place) for place in range(first, last + 1))

    def act(self, actions: list[Action], frames: tuple[BlockName, ...] = ()) -> None:
        model = self.model
        for action in actions:
            match action:
                case Write(pages, frame):
                    model.write(pages, frames[frame].name)
                case WriteDisk() | ReadDisk():
                    model.jobs.append(action)
                case DeleteDisk(deleted):
                    # The disk's thread works in order: what was queued before is done before.
                    self.finish_jobs()
                    del model.file[deleted]
                case Reply(to, Found() as found, places):
                    self.check_found((to, found.call), found, places)
                case _:
                    pass

    def check_found(self, key: Call, found: Found, payloads: tuple[Pages, ...]) -> None:
        asked = self.model.waiting.pop(key)
        places = found.pages or payloads
        assert len(places) == found.n_blocks == len(found.tiers)
        assert [self.model.read(pages) for pages in places] == list(asked[: found.n_blocks]), "wrong bytes"
        if found.pages:
            self.model.leased[key] = (self.now_ms + found.lease_ms, asked, found.pages)

    def finish_jobs(self) -> None:
        while self.model.jobs:
            self.finish_job()

    def finish_job(self) -> None:
        model = self.model
        if not model.jobs:
            return
        job = model.jobs.pop(0)
        wanted = job.block.name
        if isinstance(job, WriteDisk):
            assert model.read(job.pages) == wanted, "a block changed while it was written to disk"
            failed = self.random.random() < 0.1
            if not failed:
                model.file[wanted] = wanted
            self.act(self.core.on_disk_written(wanted, "no space" if failed else "", self.now_ms))
            return
        good = model.file.get(wanted) == wanted and self.random.random() < 0.8
        if good:
            model.write(job.pages, wanted)
        else:
            model.file.pop(wanted, None)
        self.act(self.core.on_disk_read(wanted, ok=good, now_ms=self.now_ms))

    def put(self) -> None:
        (peer, call), blocks = self.call(), self.run_of_blocks()
        self.act(
            self.core.on_message(peer, Put(call=call, blocks=blocks), [BLOCK_BYTES] * len(blocks), self.now_ms), blocks
        )

    def reserve(self) -> None:
        key, blocks = self.call(), self.run_of_blocks()
        (reply,) = self.core.on_message(key[0], Reserve(call=key[1], blocks=blocks), [], self.now_ms)
        assert isinstance(reply, Reply)
        assert isinstance(reply.message, Reserved)
        for one, place in zip(blocks, reply.message.pages, strict=True):
            assert bool(place) <= (one.name not in self.model.cached["host"])
            if place:
                self.model.write(place, b"half written")
        if any(reply.message.pages):
            self.model.writing[key] = (blocks, reply.message.pages)

    def publish(self) -> None:
        if self.model.writing:
            key = self.random.choice(list(self.model.writing))
            blocks, places = self.model.writing.pop(key)
            ok = self.random.random() < 0.8
            for one, pages in zip(blocks, places, strict=True):
                self.model.write(pages, one.name if ok else b"half written")
            actions = self.core.on_message(key[0], Publish(call=key[1], ok=ok), [], self.now_ms)
            (stored,) = [one.message for one in actions if isinstance(one, Reply)]
            assert isinstance(stored, Stored)
            self.hear()
            assert stored.n_blocks == sum(one.name in self.model.cached["host"] for one in blocks)
            self.act(actions)

    def find(self) -> None:
        key, blocks = self.call(), tuple(one.name for one in self.run_of_blocks())
        self.model.waiting[key] = blocks
        find = Find(
            call=key[1], blocks=blocks, lease_ms=self.random.randrange(3000), payloads=self.random.random() < 0.4
        )
        self.act(self.core.on_message(key[0], find, [], self.now_ms))

    def release(self) -> None:
        known = [*self.model.leased, *self.model.waiting]
        if known:
            key = self.random.choice(known)
            self.model.leased.pop(key, None)
            self.model.waiting.pop(key, None)
            self.act(self.core.on_message(key[0], Release(call=key[1]), [], self.now_ms))

    def die(self) -> None:
        peer = self.random.choice(PEERS)
        for table in (self.model.writing, self.model.leased, self.model.waiting):
            for key in [key for key in table if key[0] == peer]:
                del table[key]
        self.core.on_peer_dead(peer)
        self.core.on_peer_joined(peer, self.now_ms)

    def pass_time(self) -> None:
        self.now_ms += self.random.randrange(1500)
        over = [key for key, (until_ms, _, _) in self.model.leased.items() if self.now_ms >= until_ms]
        for key in over:
            del self.model.leased[key]
        self.act(self.core.on_tick(self.now_ms))

    def hear(self) -> None:
        for event in self.core.take_events():
            self.model.apply(event)

    def step(self) -> None:
        steps = [self.put, self.reserve, self.publish, self.find, self.find, self.release, self.pass_time]
        self.random.choice([*steps, self.publish, self.finish_job, self.finish_job, self.finish_job])()
        if self.random.random() < 0.01:
            self.die()
        self.hear()
        self.core.check()
        for _, asked, places in self.model.leased.values():
            assert [self.model.read(pages) for pages in places] == list(asked[: len(places)])
        report = self.core.report(1, self.now_ms)
        gauges, n_bytes = report.gauges, {(part.owner, part.tier): part.n_bytes for part in report.memory}
        assert n_bytes["cached", "host"] + n_bytes["free", "host"] == CAPACITY_BLOCKS * BLOCK_BYTES
        assert n_bytes["cached", "host"] >= len(self.model.cached["host"]) * BLOCK_BYTES
        assert n_bytes["cached", "disk"] == len(self.model.cached["disk"]) * FILE_BYTES
        assert gauges["blocks{tier=host}"] == len(self.model.cached["host"]) <= CAPACITY_BLOCKS
        assert gauges["blocks{tier=disk}"] == len(self.model.cached["disk"]) <= DISK_BLOCKS


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_never_break_a_law_or_show_wrong_bytes(seed: int) -> None:
    world = World(seed)
    for _ in range(STEPS):
        world.step()
    counters = world.core.report(1, world.now_ms).counters
    assert min(counters[key] for key in ("hit_tokens_total{tier=disk}", "load_failures_total", "evicted_blocks_total"))
    for peer in PEERS:
        world.core.on_peer_dead(peer)
    world.model.waiting.clear()
    world.finish_jobs()
    world.core.check()
    report = world.core.report(1, world.now_ms)
    assert (report.pages.reserved, report.pages.quarantined, report.gauges["pinned_blocks"]) == (0, 0, 0)
