"""Whatever kernel is chosen for a run, what comes out is what kernels.reference says."""

import pytest
import torch

from kernels import prefill_choice, reference
from kernels.attention import prefill_attention
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


def test_runs_computed_over_copies_and_over_pages_keep_their_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's kernel needs a GPU; which run it gets and where its result goes does not."""
    monkeypatch.setattr(prefill_choice, "pays_to_copy", lambda query, queries, keys: queries > 2)
    monkeypatch.setattr(
        prefill_choice,
        "attention_over_copy",
        lambda query, key, value, *, scaling: prefill_attention(query, key, value, scaling=scaling)[0],
    )
    counts = [(1, 20), (2, 2), (4, 17), (3, 3), (2, 9)]
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 2, 2, 16, torch.float32, device)
    check(stored, counts)


@pytest.mark.gpu
def test_long_runs_among_short_ones_equal_the_reference() -> None:
    counts = [(3, 20), LONG, (2048, 2048), (17, 17), (1, 9)]
    device = torch.device("cuda")
    stored = scatter([keys for _, keys in counts], [n for n, _ in counts], 2, 4, 128, torch.bfloat16, device)
    assert pays_to_copy(stored.query, *LONG)
    check(stored, counts)
