"""Prefill attention over pages and over views means what kernels.reference says."""

from dataclasses import dataclass

import pytest
import torch

from kernels import reference
from kernels.paged_prefill import PrefillShape, Rules, Runs, paged_prefill, prefill_in_splits
from tests.kernels.scattered import ON_DEVICE, TOLERANCE, scatter

TINY = PrefillShape(rows=16, tile_tokens=16, warps=4, stages=2)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (13, 45)
    queries: tuple[int, ...] = (13, 4)
    kv_heads: int = 1
    group: int = 3
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    strict: bool = False
    window_tokens: int | None = None
    soft_cap: float | None = None
    shape: PrefillShape = TINY
    splits: int = 1


CASES = {
    "whole prompt and cached prefix": Case(lengths=(19, 40), queries=(19, 6), kv_heads=2),
    "an empty run among others": Case(lengths=(5, 40, 9), queries=(5, 0, 1)),
    "block wider than the run": Case(shape=PrefillShape(64, 32, 4, 2)),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "one head each": Case(group=1, kv_heads=2),
    "head_dim 80": Case(head_dim=80, lengths=(20, 18), queries=(3, 18)),
    "head_dim 256": Case(head_dim=256, lengths=(33,), queries=(4,)),
    "strict": Case(strict=True),
    "strict at a tile's end": Case(strict=True, lengths=(17, 32), queries=(17, 1)),
    "window of 1": Case(window_tokens=1),
    "window within a tile": Case(window_tokens=7),
    "window over tiles": Case(window_tokens=40, lengths=(70,), queries=(20,)),
    "strict window": Case(window_tokens=20, strict=True),
    "soft cap": Case(soft_cap=2.0),
    "keys in 3 parts": Case(splits=3, lengths=(13, 70), queries=(13, 4)),
    "more parts than tiles": Case(splits=5, lengths=(3, 33), queries=(3, 1)),
    "window in parts": Case(splits=2, window_tokens=40, lengths=(90,), queries=(7,), strict=True),
}
IN_VIEWS = ("whole prompt and cached prefix", "bfloat16", "head_dim 80", "window over tiles")
CASES_AND_SOURCES = [*((name, "paged") for name in CASES), *((name, "view") for name in IN_VIEWS)]


def check(case: Case, source: str, device: torch.device, shape: PrefillShape | None) -> None:
    stored = scatter(case.lengths, case.queries, case.kv_heads, case.group, case.head_dim, case.dtype, device)
    scaling = case.head_dim**-0.5
    kv = getattr(stored, source)
    if case.splits > 1:
        rules = Rules(scaling=scaling, strict=case.strict, window_tokens=case.window_tokens, soft_cap=case.soft_cap)
        runs = Runs(stored.query_starts, stored.lengths, max(case.queries))
        out, lse = prefill_in_splits(stored.query, kv, runs, rules, case.splits, shape)
    else:
        out, lse = paged_prefill(
            stored.query,
            kv,
            stored.query_starts,
            stored.lengths,
            scaling=scaling,
            max_queries=max(case.queries),
            strict=case.strict,
            window_tokens=case.window_tokens,
            soft_cap=case.soft_cap,
            shape=shape,
        )
    begin = 0
    for row, (length, queries) in enumerate(zip(case.lengths, case.queries, strict=True)):
        mine = slice(begin, begin + queries)
        begin += queries
        meant = reference.attention(
            stored.query[mine],
            *stored.keys_values[row],
            offset=length - queries,
            scaling=scaling,
            window_tokens=case.window_tokens,
            strict=case.strict,
            soft_cap=case.soft_cap,
        )
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close((out[mine], lse[mine]), meant, atol=tolerance, rtol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize(("name", "source"), CASES_AND_SOURCES)
def test_prefill_equals_the_reference_of_each_sequence(name: str, source: str, device: torch.device) -> None:
    check(CASES[name], source, device, CASES[name].shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "dtype", "head_dim"), ON_DEVICE)
def test_prefill_with_its_own_shape_equals_the_reference_on_the_device(
    source: str, dtype: torch.dtype, head_dim: int
) -> None:
    case = Case(lengths=(700, 1500, 64), queries=(700, 300, 1), group=4, head_dim=head_dim, dtype=dtype)
    check(case, source, torch.device("cuda"), None)
