from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.server.core.block_index import BlockIndex

A, B, C, D, E = (bytes([letter]) * 16 for letter in b"abcde")
ALL = 100


def test_a_new_block_is_written_once_and_an_old_one_keeps_its_slot() -> None:
    index = BlockIndex(4)
    first = index.place([A, B])
    assert first.held == 2
    assert [position for position, _ in first.writes] == [0, 1]
    assert index.place([A, B]).writes == ()
    assert [slot for _, slot in first.writes] == list(index.leading_run([A, B], ALL))


def test_only_the_leading_run_is_found() -> None:
    index = BlockIndex(4)
    index.place([A, B, D])
    assert len(index.leading_run([A, B, C, D], ALL)) == 2
    assert index.leading_run([C, A], ALL) == ()
    assert len(index.leading_run([A, B, D], 2)) == 2


def test_the_least_recently_used_block_is_evicted() -> None:
    index = BlockIndex(2)
    index.place([A])
    index.place([B])
    index.leading_run([A], ALL)
    assert index.place([C]).evicted == 1
    assert index.holds(A)
    assert not index.holds(B)


def test_of_a_chain_the_end_is_evicted_first() -> None:
    for use in ("put", "fetch"):
        index = BlockIndex(3)
        if use == "put":
            index.place([A, B, C])
        else:
            for block in (C, B, A):
                index.place([block])
            index.leading_run([A, B, C], ALL)
        index.place([D])
        assert [index.holds(block) for block in (A, B, C)] == [True, True, False]


def test_a_put_never_evicts_its_own_blocks() -> None:
    index = BlockIndex(3)
    index.place([A, B, C])
    found = index.place([D, E, C])  # C is the oldest, and in the put
    assert found.held == 3
    assert all(index.holds(block) for block in (C, D, E))


def test_an_old_block_of_a_put_makes_no_room_for_a_new_one_of_it() -> None:
    index = BlockIndex(3)
    index.place([A, B, C])
    found = index.place([C, D])  # C is the oldest
    assert [position for position, _ in found.writes] == [1]
    assert found.evicted == 1
    assert [index.holds(block) for block in (A, B, C, D)] == [True, False, True, True]


def test_of_a_put_larger_than_the_store_the_leading_blocks_are_kept() -> None:
    index = BlockIndex(2)
    assert index.place([A, B, C, D]).held == 2
    assert [index.holds(block) for block in (A, B, C, D)] == [True, True, False, False]


def test_forgetting_frees_slots_once() -> None:
    index = BlockIndex(2)
    index.place([A, B])
    assert index.forget([A, A, C]) == 1
    assert index.forget([A]) == 0
    assert index.place([C]).evicted == 0


NAMES = st.sampled_from([bytes([letter]) * 16 for letter in b"abcdefgh"])
CALLS = st.lists(st.tuples(st.sampled_from(["put", "fetch", "forget"]), st.lists(NAMES, max_size=6)), max_size=40)


class Model:
    """The same store in the plainest words: an ordered dict of contents."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, OrderedDict[bytes, None]()

    def put(self, blocks: list[bytes]) -> None:
        wanted = list(dict.fromkeys(blocks))[: self.capacity]
        fresh = [block for block in wanted if block not in self.held]
        for block in list(self.held):
            if len(self.held) + len(fresh) <= self.capacity:
                break
            if block not in wanted:
                del self.held[block]
        self.use(wanted)

    def fetch(self, blocks: list[bytes]) -> int:
        run = 0
        while run < len(blocks) and blocks[run] in self.held:
            run += 1
        self.use(blocks[:run])
        return run

    def use(self, blocks: list[bytes]) -> None:
        for block in reversed(blocks):
            self.held[block] = None
            self.held.move_to_end(block)


@settings(deadline=None)
@given(CALLS, st.integers(1, 5))
def test_any_sequence_of_calls_holds_what_a_plain_lru_holds(
    calls: list[tuple[str, list[bytes]]], capacity: int
) -> None:
    index, model = BlockIndex(capacity), Model(capacity)
    memory: dict[int, bytes] = {}
    for call, blocks in calls:
        if call == "put":
            for position, slot in index.place(blocks).writes:
                memory[slot] = blocks[position]
            model.put(blocks)
        elif call == "fetch":
            run = index.leading_run(blocks, ALL)
            assert [memory[slot] for slot in run] == blocks[: model.fetch(blocks)]
        else:
            known = sum(block in model.held for block in set(blocks))
            assert index.forget(blocks) == known
            for block in blocks:
                model.held.pop(block, None)
        index.check()
        assert {block for _, names in calls for block in names if index.holds(block)} == set(model.held)
