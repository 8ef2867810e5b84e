"""Laws of a step's memory."""

import pytest
import torch

from services.worker.engine.scratch import ALIGNMENT_BYTES, ArenaScratch, GrowingScratch, OutOfScratch, Scratch

CPU = torch.device("cpu")


def arena(n_bytes: int = 4096) -> ArenaScratch:
    return ArenaScratch(torch.empty(n_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)[1:])


@pytest.fixture(params=["arena", "growing"])
def scratch(request: pytest.FixtureRequest) -> Scratch:
    return arena() if request.param == "arena" else GrowingScratch(CPU)


def test_what_is_taken_is_aligned_and_overlaps_nothing_that_is_taken(scratch: Scratch) -> None:
    for _ in range(2):  # a growing one has memory of its own only the second time
        with scratch.frame():
            taken = [scratch.take(shape, torch.float32) for shape in ((3, 5), (1,), (0, 4), (7,))]
            for number, tensor in enumerate(taken):
                tensor.fill_(number)
            assert [set(tensor.flatten().tolist()) for tensor in taken] == [{0.0}, {1.0}, set(), {3.0}]
            assert all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in taken)


def test_what_a_frame_took_is_given_back_at_its_end_also_if_it_fails(scratch: Scratch) -> None:
    with scratch.frame():
        scratch.take((64,), torch.uint8)
        with pytest.raises(ZeroDivisionError), scratch.frame():
            scratch.take((512,), torch.uint8)
            raise ZeroDivisionError
        scratch.take((64,), torch.bfloat16)
        assert scratch.peak_bytes == 64 + 512
    with scratch.frame():
        scratch.take((65,), torch.uint8)
        assert scratch.peak_bytes == 128


def test_an_arena_gives_what_it_has_and_not_a_byte_more() -> None:
    scratch = arena(256)
    capacity_bytes = scratch.capacity_bytes
    with scratch.frame():
        scratch.take((capacity_bytes,), torch.uint8)
        with pytest.raises(OutOfScratch, match=r"\[1\] torch.uint8 \(1 bytes\)"):
            scratch.take((1,), torch.uint8)


def test_an_arena_moves_to_other_memory_between_steps_only() -> None:
    scratch, other = arena(), torch.zeros(1024, dtype=torch.uint8)
    with scratch.frame(), pytest.raises(AssertionError, match="between steps"):
        scratch.use(other)
    scratch.use(other)
    with scratch.frame():
        scratch.take((4,), torch.int32).fill_(-1)
    assert int(other.count_nonzero()) == 16


def test_a_growing_scratch_holds_what_the_largest_step_took_and_moves_nothing_meanwhile() -> None:
    scratch = GrowingScratch(CPU)
    for n_bytes, held_bytes in ((128, 128), (1024, 1024), (64, 1024)):
        with scratch.frame():
            first = scratch.take((n_bytes // 2,), torch.uint8).fill_(7)
            scratch.take((n_bytes // 2,), torch.uint8).fill_(9)
            assert bool((first == 7).all())
        assert scratch.held_bytes == held_bytes
