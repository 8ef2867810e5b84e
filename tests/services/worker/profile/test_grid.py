"""Laws of the grid that a profile measures."""

import pytest

from services.worker.profile.grid import GridLimits, GridPoint, choose_grid

LIMITS = GridLimits(context_tokens=2048, pool_tokens=70_000, max_step_tokens=512, max_running=64)


def limits(context_tokens: int = 2048, pool_tokens: int = 70_000) -> GridLimits:
    return GridLimits(context_tokens=context_tokens, pool_tokens=pool_tokens, max_step_tokens=512, max_running=64)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("context_tokens", [40, 2048, 131_072])
@pytest.mark.parametrize("pool_tokens", [32, 1000, 70_000, 10**7])
def test_no_point_exceeds_the_context_or_the_pages(quick: bool, context_tokens: int, pool_tokens: int) -> None:
    points = choose_grid(limits(context_tokens, pool_tokens), 16, quick=quick)
    assert points and len(set(points)) == len(points)
    for point in points:
        assert point.context + point.count <= context_tokens
        assert point.rows * -(-(point.context + point.count) // 16) * 16 <= pool_tokens
        assert point.count <= 512 and point.rows <= 64


def test_both_phases_are_measured_up_to_the_limits_of_a_step() -> None:
    points = choose_grid(LIMITS, 16, quick=False)
    prompts, batches = [p for p in points if not p.decodes], [p for p in points if p.decodes]
    assert max(p.count for p in prompts) == 512 and max(p.rows for p in batches) == 64
    assert len({p.context for p in prompts}) >= 3 and len({p.context for p in batches}) >= 3


def test_a_quick_grid_is_a_small_part_that_still_has_two_of_everything() -> None:
    whole, quick = choose_grid(LIMITS, 16, quick=False), choose_grid(LIMITS, 16, quick=True)
    assert len(quick) < len(whole) / 2
    for phase in (True, False):
        points = [p for p in quick if p.decodes == phase]
        assert min(len({p.context for p in points}), len({(p.rows, p.count) for p in points})) >= 2


def test_a_pool_without_room_for_a_block_has_no_grid() -> None:
    assert choose_grid(limits(pool_tokens=0), 16, quick=False) == []


def test_a_point_is_the_work_that_its_step_computes() -> None:
    decode, prefill = GridPoint(4, 1, 99).work, GridPoint(1, 3, 4).work
    assert (decode.new_tokens, decode.rows, decode.kv_tokens) == (0, 4, 400)
    assert (prefill.new_tokens, prefill.pairs, prefill.rows) == (3, 5 + 6 + 7, 0)
