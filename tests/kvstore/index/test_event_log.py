"""Events tell a reader exactly what is cached, in order and without a gap."""

import random

from common.errors import OutOfPages
from common.ids import Owner
from common.messages.cache_events import CacheEvent
from kvstore.index.event_log import EventLog
from kvstore.index.ledger import PageState
from tests.kvstore.index.chains import ROOT, block_pool, chain, prompt, straight


def test_events_carry_what_a_tree_needs() -> None:
    pool, log, names = block_pool(4), EventLog("host"), straight(2)
    pool.listen(log)
    pages = pool.alloc(Owner("a"), 2, PageState.ACTIVE)
    pool.publish(Owner("a"), names, pages, parent=ROOT, depth=0)
    pool.release(Owner("a"))
    pool.take(Owner("b"), names)
    pool.release(Owner("b"))
    pool.evict(1)
    assert log.take() == [
        CacheEvent(1, "stored", names[0], ROOT, 0, "host"),
        CacheEvent(2, "stored", names[1], names[0], 1, "host"),
        CacheEvent(3, "removed", names[1], b"", 0, "host"),
    ]
    assert log.take() == []
    pool.forget(names)
    assert [event.number for event in log.take()] == [log.last_number] == [4]


def test_a_reader_of_all_events_knows_what_is_cached() -> None:
    rng, pool, log = random.Random(3), block_pool(12), EventLog("device")
    pool.listen(log)
    known: set[bytes] = set()
    last = 0
    for number in range(400):
        names, owner = chain(prompt(rng)), Owner(f"o{number}")
        try:
            pages = pool.alloc(owner, len(names), PageState.ACTIVE)
            pool.publish(owner, names, pages, parent=ROOT, depth=0)
        except OutOfPages:
            pool.withdraw(owner, 2)
        if rng.random() < 0.8:
            pool.release(owner)
        for event in log.take() if rng.random() < 0.5 else []:
            last += 1
            assert event.number == last
            (known.add if event.kind == "stored" else known.remove)(event.name)
    for event in log.take():
        (known.add if event.kind == "stored" else known.remove)(event.name)
    assert known == {block.name for block in pool.cache}
