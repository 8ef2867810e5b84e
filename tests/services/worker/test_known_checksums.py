"""What is known of others' pages is found by page, and leaves with what it belongs to."""

import numpy as np

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.blocks import Find, Found, Publish, Release, Stored
from kvstore.transport.block_jobs import BlockJobDone, FetchJob, StoreJob
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.known_checksums import KnownChecksums

STORE = PeerId("kvstore@1")
PAGES = np.array([[5, 6], [7, 8]], np.int32)


def test_a_found_run_is_known_until_its_release() -> None:
    known = KnownChecksums()
    known.on_found(STORE, Found(call=1, n_blocks=2, pages=((5, 6), (7, 8)), checksums=((50, 60), (70, 80))))
    some = known.expected(STORE, 1, np.array([[8], [9]], np.int32))
    assert some is not None and some.tolist() == [[80], [-1]]
    assert known.expected(STORE, 2, PAGES) is None
    known.told(STORE, Release(call=1))
    assert known.expected(STORE, 1, PAGES) is None and len(known) == 0


def test_who_keeps_wrong_pages_is_told_which_blocks_they_are_of() -> None:
    known = KnownChecksums()
    known.told(STORE, Find(call=1, blocks=(b"a", b"b"), lease_ms=1))
    known.on_found(STORE, Found(call=1, n_blocks=2, pages=((5, 6), (7, 8)), checksums=((50, 60), (70, 80))))
    job = FetchJob(1, STORE, PAGES, PAGES, 0.0, by_layer=True)
    done = BlockJobDone(1, False, 0, 0, 0.0, "wrong", wrong_peer_pages=(8, 7, 99))
    assert known.accusations(job, done) == [Send(STORE, Release(call=1, corrupt=(b"b",)))]
    assert known.accusation(STORE, 1, (0, 5)).corrupt == (b"a",)
    known.told(STORE, Release(call=1))
    assert known.accusation(STORE, 1, (0,)).corrupt == ()


def test_what_was_stored_is_published_with_its_checksums_until_that_is_answered() -> None:
    known, publish = KnownChecksums(), Publish(call=3, ok=True)
    known.on_stored(StoreJob(3, STORE, PAGES, PAGES), (1, 2, 3, 4))
    for _ in range(2):
        assert known.told(STORE, publish) == Publish(call=3, ok=True, checksums=((1, 2), (3, 4)))
    known.on_answer(STORE, Stored(call=3, n_blocks=2))
    assert known.told(STORE, publish) == publish and len(known) == 0


def test_of_a_parked_page_the_last_copy_counts() -> None:
    known = KnownChecksums()
    for sums in ((1, 2, 3, 4), (5, 6, 7, 8)):
        known.on_stored(StoreJob(3, HOST_BUFFER, PAGES, PAGES), sums)
    found = known.expected(HOST_BUFFER, 9, PAGES[:, 1:])
    assert found is not None and found.tolist() == [[6], [8]]


def test_a_holder_takes_what_it_kept_with_it() -> None:
    known = KnownChecksums()
    known.on_found(STORE, Found(call=1, n_blocks=1, pages=((5, 6),), checksums=((1, 2),)))
    known.on_stored(StoreJob(3, STORE, PAGES, PAGES), (1, 2, 3, 4))
    known.forget(STORE)
    assert len(known) == 0
