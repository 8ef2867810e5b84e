"""Whatever kernel is chosen for a run, what comes out is what kernels.reference says."""

import pytest
import torch
from torch import Tensor

from kernels import prefill_choice, reference
from kernels.paged_prefill import prefill_in_splits
from kernels.prefill_choice import pays_to_copy, prefill_runs
from tests.kernels.scattered import Scattered, scatter

LONG = (2048, 3072)


def check(stored: Scattered, counts: list[tuple[int, int]], window_tokens: int | None = None) -> None:
    out = prefill_runs(
        stored.query,
        stored.paged,
        stored.query_starts,
        stored.lengths,
        counts,
        scaling=0.1,
        window_tokens=window_tokens,
    )
    begin = 0
    for (queries, keys), (key, value) in zip(counts, stored.keys_values, strict=True):
        mine = slice(begin, begin + queries)
        begin += queries
        meant, _ = reference.attention(
            stored.query[mine], key, value, offset=keys - queries, scaling=0.1, window_tokens=window_tokens
        )
        torch.testing.assert_close(out[mine], meant, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("window_tokens", [None, 6])
def test_runs_of_any_length_equal_the_reference(window_tokens: int | None, device: torch.device) -> None:
    counts = [(3, 20), (17, 17), (1, 9)]
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 2, 2, 32, torch.float32, device)
    check(stored, counts, window_tokens)


@pytest.mark.long
@pytest.mark.parametrize("window_tokens", [None, 50])
def test_few_queries_after_many_keys_are_computed_in_parts_and_keep_their_rows(
    window_tokens: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def recorded(*arguments: object) -> object:
        parts.append(arguments[4])
        return prefill_in_splits(*arguments)

    monkeypatch.setattr(prefill_choice, "_LEAST_PART_TOKENS", 16)
    monkeypatch.setattr(prefill_choice, "processors", lambda device: 8)
    monkeypatch.setattr(prefill_choice, "prefill_in_splits", recorded)
    counts = [(20, 20), (3, 80), (2, 40), (17, 17), (1, 90)]
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 1, 2, 16, torch.float32, device)
    check(stored, counts, window_tokens)
    assert parts == ([4, 5] if window_tokens is None else [3, 3])


@pytest.mark.long
@pytest.mark.parametrize("before", [0, 37, 7 * 32])
def test_runs_computed_over_copies_and_over_pages_keep_their_rows(
    before: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's kernel needs a GPU; which run it gets, in which pieces, and where its results go does not."""

    def by_reference(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, causal: bool) -> object:
        assert not (query.shape[0] % 32 or key.shape[0] % 32)
        return reference.attention(query, key, value, offset=0 if causal else key.shape[0], scaling=scaling)

    monkeypatch.setattr(prefill_choice, "_GRAIN_TOKENS", 32)
    monkeypatch.setattr(prefill_choice, "_LARGEST_PIECE_TOKENS", 128)
    monkeypatch.setattr(prefill_choice, "cudnn_attention", by_reference)
    monkeypatch.setattr(prefill_choice, "pays_to_copy", lambda query, queries, keys: queries > 2)
    counts = [(1, 20), (2, 2), (40, before + 40), (32, before + 32), (2, 9)]
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 2, 2, 16, torch.float32, device)
    check(stored, counts)


def test_only_few_pairs_of_lengths_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_choice, "_LARGEST_PIECE_TOKENS", 8 * 1024)
    cut = list(prefill_choice._pieces((2 * 8 + 5) * 1024))
    assert [piece.stop - piece.start for piece in cut] == [8192, 8192, 4096, 1024]
    assert [piece.start for piece in cut[1:]] == [piece.stop for piece in cut[:-1]]


@pytest.mark.parametrize(
    ("queries", "keys", "pays"),
    [(8192, 8192, True), (4096, 32768, True), (512, 32768, False), (2049, 2049, False), (4096, 4596, False)],
)
def test_a_copy_pays_where_the_library_wastes_little(queries: int, keys: int, pays: bool) -> None:
    assert pays_to_copy(torch.empty(1, 8, 128, dtype=torch.bfloat16), queries, keys) is pays
    assert not pays_to_copy(torch.empty(1, 8, 128), queries, keys)


@pytest.mark.gpu
def test_long_runs_among_short_ones_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_choice, "_COPY_FLOP", 0.0)  # few heads make a reference that fits
    counts = [(3, 20), LONG, (2048, 2048), (17, 17), (3500, 13740), (4096, 4096 + 5000), (1, 9)]
    device = torch.device("cuda")
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 2, 4, 128, torch.bfloat16, device)
    assert [pays_to_copy(stored.query, *count) for count in counts] == [False, True, True, False, True, True, False]
    check(stored, counts)
