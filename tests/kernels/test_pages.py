"""K and V written to pages come back from the same places."""

import pytest
import torch

from kernels import reference
from kernels.checks import KernelInputError
from kernels.pages import PageViews


def test_gather_returns_the_pages_in_the_order_asked_for() -> None:
    pages = torch.randn(6, 2, 16, 2, 8)
    views = PageViews(pages)
    ids = [4, 0, 5]
    keys, values = reference.gather_tokens(pages, ids, 48)
    for side, expected in enumerate((keys, values)):
        out = torch.empty_like(expected)
        assert views.gather_into(out, torch.tensor([2 * p + side for p in ids])) is out
        assert torch.equal(out, expected)


def test_a_batch_of_gathers_keeps_sequences_apart() -> None:
    pages = torch.randn(6, 2, 4, 1, 8)
    found = PageViews(pages).gather_into(torch.empty(2, 8, 1, 8), torch.tensor([[2, 8], [10, 0]]))
    assert torch.equal(found[0], pages[[1, 4], 0].flatten(0, 1))
    assert torch.equal(found[1], pages[[5, 0], 0].flatten(0, 1))


def test_write_touches_the_named_rows_only() -> None:
    pages = torch.zeros(3, 2, 4, 2, 8, dtype=torch.bfloat16)
    views = PageViews(pages)
    kv = torch.randn(2, 16)
    views.write_into(torch.tensor([(2 * 1) * 4 + 3, (2 * 1 + 1) * 4 + 3]), kv)
    assert torch.equal(pages[1, 0, 3].flatten(), kv[0].bfloat16())
    assert torch.equal(pages[1, 1, 3].flatten(), kv[1].bfloat16())
    pages[1, :, 3] = 0
    assert not pages.any()


def test_a_pool_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(KernelInputError, match="pages: "):
        PageViews(torch.zeros(3, 4, 2, 8))
