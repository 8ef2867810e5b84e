"""Decode attention over pages and over views means what kernels.reference says."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.kv_source import KvSource
from kernels.paged_decode import DecodeShape, paged_decode
from tests.kernels.scattered import ON_DEVICE, TOLERANCE, Scattered, scatter

TINY = DecodeShape(16, 4, 2, programs_per_processor=1, longest_split_tokens=64)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (1, 0, 37)
    kv_heads: int = 1
    group: int = 3
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    window_tokens: int | None = None
    soft_cap: float | None = None
    shape: DecodeShape = TINY
    bound: int | None = None


CASES = {
    "plain": Case(lengths=(1, 20, 0, 50), kv_heads=2),
    "many splits": Case(lengths=(130, 3), shape=DecodeShape(16, 4, 2, 1, longest_split_tokens=32)),
    "one split": Case(lengths=(70, 3), shape=DecodeShape(32, 4, 2, 1)),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "one head each": Case(group=1, kv_heads=2, lengths=(20,)),
    "wide group": Case(group=20),
    "head_dim 80": Case(head_dim=80),
    "head_dim 256": Case(head_dim=256, lengths=(20,)),
    "window of 1": Case(window_tokens=1),
    "window within a tile": Case(window_tokens=9),
    "window over splits": Case(window_tokens=40, lengths=(1, 41, 0, 90)),
    "soft cap": Case(soft_cap=2.0),
    "captured for longer contexts": Case(lengths=(5, 0, 100), bound=1000),
}
IN_VIEWS = ("plain", "many splits", "bfloat16", "head_dim 80", "window over splits")
CASES_AND_SOURCES = [*((name, "paged") for name in CASES), *((name, "view") for name in IN_VIEWS)]


def decode(case: Case, stored: Scattered, kv: KvSource) -> tuple[Tensor, Tensor]:
    return paged_decode(
        stored.query,
        kv,
        stored.lengths,
        scaling=0.3,
        max_length=case.bound or max(case.lengths),
        window_tokens=case.window_tokens,
        soft_cap=case.soft_cap,
        shape=case.shape,
    )


@pytest.mark.long
@pytest.mark.parametrize(("name", "source"), CASES_AND_SOURCES)
def test_decode_equals_the_reference_of_each_sequence(name: str, source: str, device: torch.device) -> None:
    case = CASES[name]
    stored = scatter(
        case.lengths, (1,) * len(case.lengths), case.kv_heads, case.group, case.head_dim, case.dtype, device
    )
    out, lse = decode(case, stored, getattr(stored, source))
    for row, length in enumerate(case.lengths):
        meant = reference.attention(
            stored.query[row : row + 1],
            *stored.keys_values[row],
            offset=length - 1,
            scaling=0.3,
            window_tokens=case.window_tokens,
            soft_cap=case.soft_cap,
        )
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close(out[row : row + 1], meant[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[row : row + 1], meant[1], atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_decode_captured_in_a_graph_follows_the_lengths_of_each_replay() -> None:
    device = torch.device("cuda")
    case = Case(lengths=(700, 2000), kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16)
    stored = scatter(case.lengths, (1, 1), 2, 4, 128, torch.bfloat16, device)
    paged_decode(stored.query, stored.paged, stored.lengths, scaling=0.1, max_length=2000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = paged_decode(stored.query, stored.paged, stored.lengths, scaling=0.1, max_length=2000)
    for lengths in ((700, 2000), (1, 64), (0, 1999)):
        stored.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        for row, length in enumerate(lengths):
            keys, values = stored.keys_values[row]
            meant = reference.attention(
                stored.query[row : row + 1], keys[:length], values[:length], offset=length - 1, scaling=0.1
            )
            torch.testing.assert_close((out[row : row + 1], lse[row : row + 1]), meant, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "dtype", "head_dim"), ON_DEVICE)
def test_decode_with_its_own_shape_equals_the_reference_on_the_device(
    source: str, dtype: torch.dtype, head_dim: int
) -> None:
    lengths = (5000, 1, 777, 0, 4096)
    stored = scatter(lengths, (1,) * 5, 2, 4, head_dim, dtype, torch.device("cuda"))
    out, lse = paged_decode(
        stored.query, getattr(stored, source), stored.lengths, scaling=head_dim**-0.5, max_length=5000
    )
    for row, length in enumerate(lengths):
        meant = reference.attention(
            stored.query[row : row + 1], *stored.keys_values[row], offset=length - 1, scaling=head_dim**-0.5
        )
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close((out[row : row + 1], lse[row : row + 1]), meant, atol=tolerance, rtol=tolerance)
