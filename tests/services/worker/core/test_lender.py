"""Laws of what is lent to readers: one lease for each call, never longer than the bound, and no answer without end."""

from common.block_hash import BlockHash
from common.ids import Owner, PeerId
from common.messages.actions import Send
from common.messages.blocks import Find, Found
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from services.worker.core.actions import SendBlocks
from services.worker.core.lender import Lender

READER, OTHER = PeerId("prefill-1@1"), PeerId("prefill-2@1")
NAMES = [BlockHash(bytes([number]) * 16) for number in range(1, 5)]
ROOT = BlockHash(bytes(16))


def holding() -> BlockPool:
    pool, owner = BlockPool(Ledger(16), 2, Lru()), Owner("first")
    pages = pool.alloc(owner, len(NAMES), PageState.ACTIVE)
    pool.publish(owner, NAMES, pages, parent=ROOT, depth=0)
    pool.release(owner)
    return pool


def find(call: int = 1, *, n_blocks: int = 4, lease_ms: int = 5_000, payloads: bool = False) -> Find:
    return Find(call=call, blocks=tuple(NAMES[:n_blocks]), lease_ms=lease_ms, payloads=payloads)


def found(actions: list[object]) -> Found:
    (action,) = actions
    assert isinstance(action, Send | SendBlocks)
    assert isinstance(action.message, Found)
    return action.message


def test_a_question_that_comes_twice_has_one_lease() -> None:
    pool = holding()
    lender = Lender(pool, 64)
    for n_blocks in (4, 4, 2):
        assert found(lender.on_find(READER, find(n_blocks=n_blocks), 0.0)).n_blocks == n_blocks
    assert lender.n_leases == 1 and pool.cache.n_pinned == 2
    lender.on_release(OTHER, 1)
    assert lender.n_leases == 1, "a lease is one reader's"
    lender.on_release(READER, 1)
    assert lender.n_leases == pool.cache.n_pinned == 0
    pool.check()


def test_no_reader_keeps_blocks_for_longer_than_the_bound() -> None:
    pool = holding()
    lender = Lender(pool, 64)
    assert found(lender.on_find(READER, find(lease_ms=10**9), 0.0)).lease_ms == 10_000
    lender.on_tick(9_999.0)
    assert pool.cache.n_pinned == 4
    lender.on_tick(10_000.0)
    assert pool.cache.n_pinned == lender.n_leases == 0


def test_a_reader_that_is_gone_ends_its_own_leases_and_no_others() -> None:
    pool = holding()
    lender = Lender(pool, 64)
    lender.on_find(READER, find(1), 0.0)
    lender.on_find(READER, find(2), 0.0)
    lender.on_find(OTHER, find(1, n_blocks=3), 0.0)
    lender.on_reader_gone(READER)
    assert lender.n_leases == 1 and pool.cache.n_pinned == 3


def test_an_answer_by_message_has_a_bound_says_that_there_is_more_and_keeps_nothing() -> None:
    pool = holding()
    lender = Lender(pool, 6 * 2**20)
    answer = found(lender.on_find(READER, find(payloads=True), 0.0))
    assert (answer.n_blocks, answer.more, lender.n_leases, pool.cache.n_pinned) == (2, True, 0, 0)
    assert lender.sent_bytes_total == 2 * 6 * 2**20
