"""Copies move whole pages, byte for byte, and touch nothing else."""

import pytest
import torch
from torch import Tensor

from kernels import page_copy, reference_ops
from kernels.checks import KernelInputError
from kernels.page_copy import copy_pages, gather_pages, scatter_pages


def pool(n_pages: int, *shape: int, dtype: torch.dtype = torch.bfloat16, device: torch.device) -> Tensor:
    return torch.randn(n_pages, *shape, device=device).to(dtype)


def ids(*values: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(2, 4, 2, 16), (2, 3, 1, 5), (2, 8, 2, 80)])
def test_pages_move_between_pools(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    source, target = pool(6, *shape, dtype=dtype, device=device), pool(5, *shape, dtype=dtype, device=device)
    expected = target.clone()
    read, write = ids(5, 0, 3, device=device), ids(1, 4, 2, device=device, dtype=torch.int32)
    reference_ops.copy_pages(source, read, expected, write)
    copy_pages(source, read, target, write)
    assert torch.equal(target, expected)


def test_within_one_pool_other_pages_stay(device: torch.device) -> None:
    pages = pool(6, 2, 4, 1, 8, device=device)
    expected = pages.clone()
    expected[4], expected[0] = pages[1], pages[5]
    copy_pages(pages, ids(1, 5, device=device), pages, ids(4, 0, device=device))
    assert torch.equal(pages, expected)


def test_a_slice_of_layers_of_whole_blocks(device: torch.device) -> None:
    blocks = pool(4, 6, 2, 4, 1, 8, device=device)  # [blocks, layers, ...]
    out = torch.empty(2, 3, 2, 4, 1, 8, dtype=blocks.dtype, device=device)
    gather_pages(blocks[:, 2:5], ids(3, 1, device=device), out)
    assert torch.equal(out, blocks[[3, 1], 2:5])
    scatter_pages(out, blocks[:, :3], ids(0, 2, device=device))
    assert torch.equal(blocks[[0, 2], :3], out)


def test_runs_of_neighbouring_pages_go_as_one_copy(device: torch.device) -> None:
    pages = pool(9, 2, 4, 1, 8, device=device)
    out = torch.empty(6, 2, 4, 1, 8, dtype=pages.dtype, device=device)
    gather_pages(pages, ids(5, 1, device=device), out, run_pages=3)
    assert torch.equal(out, pages[[5, 6, 7, 1, 2, 3]])
    target = torch.zeros_like(pages)
    scatter_pages(out, target, ids(0, 4, device=device), run_pages=3)
    assert torch.equal(target[[0, 1, 2, 4, 5, 6]], out)
    assert not target[[3, 7, 8]].any()
    copied = torch.zeros_like(pages)
    copy_pages(pages, ids(6, device=device), copied, ids(2, device=device), run_pages=2)
    assert torch.equal(copied[2:4], pages[6:8])
    assert not copied[4:].any()


def test_many_pages_take_the_large_slices(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_copy, "_ENOUGH_PROGRAMS", 2)
    pages = torch.arange(3 * 2100, device=device).view(3, 2100)
    out = torch.empty(2, 2100, dtype=pages.dtype, device=device)
    gather_pages(pages, ids(2, 0, device=device), out)
    assert torch.equal(out, pages[[2, 0]])


def test_no_ids_copy_nothing(device: torch.device) -> None:
    pages = pool(2, 8, device=device)
    before = pages.clone()
    copy_pages(pages, ids(device=device), pages, ids(device=device))
    assert torch.equal(pages, before)


def test_pages_of_another_length_are_refused(device: torch.device) -> None:
    with pytest.raises(KernelInputError, match="target: 8 bytes a page, expected the source's 16"):
        copy_pages(pool(2, 8, device=device), ids(0, device=device), pool(2, 4, device=device), ids(1, device=device))


def test_runs_over_gaps_are_refused(device: torch.device) -> None:
    blocks = pool(4, 6, 8, device=device)
    with pytest.raises(KernelInputError, match="no gaps"):
        gather_pages(blocks[:, 2], ids(0, device=device), torch.empty(2, 8, device=device).bfloat16(), run_pages=2)
