"""A copy that breaks at any block undoes its whole call: same bytes found, same room, nothing held."""

from collections.abc import Callable

import pytest

from kvstore import Medium, MemPool
from tests.kvstore.pool.builders import BreakingCopy, CopyFailed, fill, holds, names_of, pool, tokens_of

N_BLOCKS = 4
TOKENS = tokens_of(N_BLOCKS)


class Pair:
    """A pool with four visible blocks, whose copies break, and a receiver that has one block and others of its own."""

    def __init__(self, medium: Medium) -> None:
        self.copies = BreakingCopy()
        self.a, self.b = pool(instance="a", copy=self.copies), pool(device=6, instance="b")
        self.insert(self.a, TOKENS, medium)
        self.insert(self.b, TOKENS[:4], Medium.HOST)
        self.target = self.b.alloc_mem(N_BLOCKS, Medium.DEVICE, "q")

    def insert(self, one: MemPool, tokens: list[int], medium: Medium) -> None:
        addresses = one.alloc_mem(len(names_of(tokens)), medium, "w")
        fill(one, addresses, names_of(tokens))
        one.insert(tokens, addresses)

    def state(self) -> list[object]:
        seen: list[object] = []
        for one in (self.a, self.b):
            match = one.match(TOKENS)
            assert holds(one, match.addresses, match.names)
            one.check()
            seen += [match, *(one.available_blocks(medium) for medium in Medium)]
            seen += [sorted(tier.pool.ledger.owners()) for tier in one._media.tiers.values()]
        return seen


def swap_out(pair: Pair) -> None:
    pair.a.swap_out(N_BLOCKS)


def swap_in(pair: Pair) -> None:
    pair.a.swap_in(pair.a.match(TOKENS).addresses)


def transfer(pair: Pair) -> None:
    pair.a.transfer(pair.b, pair.a.match(TOKENS).addresses[:2])


def transfer_to_target(pair: Pair) -> None:
    pair.a.transfer(pair.b, pair.a.match(TOKENS).addresses, pair.target)


def send(pair: Pair) -> None:
    pair.a.transfer_with_insert(pair.b, TOKENS, pair.a.match(TOKENS).addresses, medium=Medium.HOST)


def send_to_target(pair: Pair) -> None:
    pair.a.transfer_with_insert(pair.b, TOKENS, pair.a.match(TOKENS).addresses, pair.target)


CALLS: dict[str, tuple[Callable[[Pair], None], Medium, int]] = {
    "swap_out": (swap_out, Medium.DEVICE, 4),
    "swap_in": (swap_in, Medium.HOST, 4),
    "transfer": (transfer, Medium.DEVICE, 2),
    "transfer to a target": (transfer_to_target, Medium.DEVICE, 4),
    "transfer_with_insert": (send, Medium.DEVICE, 3),
    "transfer_with_insert to a target": (send_to_target, Medium.DEVICE, 4),
}


@pytest.mark.parametrize(
    ("call", "fails_at"), [(name, step) for name, (_, _, steps) in CALLS.items() for step in range(steps + 1)]
)
def test_a_broken_copy_leaves_everything_as_it_was(call: str, fails_at: int) -> None:
    act, medium, n_steps = CALLS[call]
    pair = Pair(medium)
    before = pair.state()
    pair.copies.fails_at = fails_at
    if fails_at == n_steps:  # the step after the last: the call ends well, so every step before was tried
        act(pair)
        assert pair.copies.done == n_steps
        assert pair.state() != before or call == "transfer to a target"
        return
    with pytest.raises(CopyFailed):
        act(pair)
    assert pair.copies.done == fails_at
    assert pair.state() == before
    pair.copies.fails_at, pair.copies.done = None, 0
    act(pair)  # and it goes well the second time
    assert pair.copies.done == n_steps
    pair.state()


def test_what_a_broken_swap_put_back_goes_in_the_same_order_again() -> None:
    pair = Pair(Medium.DEVICE)
    pair.copies.fails_at = 0
    with pytest.raises(CopyFailed):
        pair.a.swap_out(3)
    pair.copies.fails_at = None
    moved = pair.a.swap_out(2)
    assert set(pair.a.match(TOKENS).addresses[2:]) == set(moved)
