"""With `verify`, a block that went wrong on the way or where it lay reaches nobody, and is found by nobody any more."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from common.errors import KvCorrupt
from kvstore import Medium, MemPool, PoolOptions
from kvstore.pool.tier import Bytes
from kvstore.pool.transfer import BlockCopy, copy_blocks
from tests.kvstore.pool.builders import BLOCK_BYTES, LAYOUT, fill, holds, names_of, tokens_of

N_BLOCKS = 3
TOKENS = tokens_of(N_BLOCKS)


class SpoilingCopy:
    """Turns one bit over in the last block of a copy, if it is told to."""

    def __init__(self) -> None:
        self.spoils = False

    def __call__(
        self, target: Bytes, target_blocks: Sequence[int], source: Bytes, source_blocks: Sequence[int]
    ) -> None:
        copy_blocks(target, target_blocks, source, source_blocks)
        if self.spoils:
            target[target_blocks[-1], -1] ^= 1


class Pair:
    """A pool with three visible blocks, and an empty receiver."""

    def __init__(self, medium: Medium, copy: BlockCopy = copy_blocks, *, verify: bool = True) -> None:
        self.a, self.b = (
            MemPool.open(
                LAYOUT, 8 * BLOCK_BYTES, 8 * BLOCK_BYTES, instance=name, options=PoolOptions(verify=verify, copy=copy)
            )
            for name in "ab"
        )
        addresses = self.a.alloc_mem(N_BLOCKS, medium, "w")
        fill(self.a, addresses, names_of(TOKENS))
        self.a.insert(TOKENS, addresses)

    def spoil(self, place: int) -> None:
        """One bit of a visible block turns over where it lies."""
        address = self.a.match(TOKENS).addresses[place]
        self.a._media.tier(address).memory[address.block, 1] ^= 4

    def check(self) -> None:
        for one in (self.a, self.b):
            one.check()
            match = one.match(TOKENS)
            assert holds(one, match.addresses, match.names)


def swap_out(pair: Pair) -> None:
    assert len(pair.a.swap_out(N_BLOCKS)) == N_BLOCKS


def swap_in(pair: Pair) -> None:
    pair.a.swap_in(pair.a.match(TOKENS).addresses)


def transfer(pair: Pair) -> None:
    pair.a.transfer(pair.b, pair.a.match(TOKENS).addresses)


def send(pair: Pair) -> None:
    pair.a.transfer_with_insert(pair.b, TOKENS, pair.a.match(TOKENS).addresses)


CALLS = pytest.mark.parametrize(
    ("act", "medium"),
    [(swap_out, Medium.DEVICE), (swap_in, Medium.HOST), (transfer, Medium.DEVICE), (send, Medium.HOST)],
)
Act = Callable[[Pair], None]


@CALLS
def test_a_wrong_copy_is_used_by_nobody_and_the_block_stays(act: Act, medium: Medium) -> None:
    copy = SpoilingCopy()
    pair = Pair(medium, copy)
    before, copy.spoils = pair.a.match(TOKENS), True
    with pytest.raises(KvCorrupt, match=rf"1 pages of {medium.value} blocks"):
        act(pair)
    assert pair.a.match(TOKENS) == before and pair.b.match(TOKENS).n_blocks == 0
    assert (pair.a.checks.checked_pages, pair.a.checks.wrong_pages) == (N_BLOCKS * LAYOUT.layers, 1)
    pair.check()
    copy.spoils = False
    act(pair)
    pair.check()


@CALLS
def test_a_block_that_went_wrong_where_it_lay_is_found_no_more(act: Act, medium: Medium) -> None:
    pair = Pair(medium)
    pair.spoil(1)
    with pytest.raises(KvCorrupt):
        act(pair)
    assert pair.a.match(TOKENS).n_blocks == 1 and pair.b.match(TOKENS).n_blocks == 0
    pair.check()


def test_a_wrong_block_that_somebody_has_pinned_stays_until_it_is_copied_without_a_pin() -> None:
    pair = Pair(Medium.DEVICE)
    lease = pair.a.pin(pair.a.match(TOKENS), "reader", 1e6)
    pair.spoil(0)
    for n_blocks in (N_BLOCKS, 0):
        with pytest.raises(KvCorrupt):
            pair.a.transfer(pair.b, lease.addresses)
        assert pair.a.match(TOKENS).n_blocks == n_blocks
        pair.a.unpin(lease)


def test_a_private_block_may_change_until_it_is_copied_and_memory_given_out_again_has_no_past() -> None:
    pair = Pair(Medium.DEVICE)
    pair.a.delete(TOKENS)
    blocks = pair.a.alloc_mem(8, Medium.DEVICE, "w")  # those of before, too
    for byte in (1, 2):
        for block in blocks:
            pair.a.write(block, 0, bytes([byte]) * LAYOUT.page_bytes)
        (there,) = pair.a.transfer(pair.b, blocks[:1])
        assert pair.b.read(there)[0, 0] == byte
    pair.a.transfer(pair.b, blocks[1:4])


def test_without_it_nothing_is_compared() -> None:
    pair = Pair(Medium.DEVICE, verify=False)
    pair.spoil(1)
    send(pair)
    assert pair.a.checks.checked_pages == 0 and np.any(pair.b.read(pair.b.match(TOKENS).addresses[1]))
