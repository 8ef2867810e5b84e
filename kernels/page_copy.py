"""Copying whole pages between page tensors of one device (Triton).

Whatever its shape, a page is a run of bytes; programs move slices of it as 8-byte words, two to a 16-byte access.
Few large pages are cut into many slices, small ones take a program each. Meaning: `kernels.reference_ops`.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require, require_same_device

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_SLICE_WORDS, _SMALL_SLICE_WORDS = 2048, 512
_ENOUGH_PROGRAMS = 512
"""With fewer programs than this, smaller slices keep more of a large device busy."""


def copy_pages(source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor, *, run_pages: int = 1) -> None:
    """target[target_ids[i]] = source[source_ids[i]] for every i, byte for byte.

    source, target      [pages, ...] of any shapes whose pages have the same number of bytes. Every page is contiguous;
                        the distance from page to page may be larger (a slice of the layers of [blocks, layers, ...])
    source_ids, target_ids   int32 or int64 [n] on the device; target ids must not repeat, and must not be among the
                        source ids where both tensors are the same memory
    run_pages           so many neighbouring pages from each id on are one copy (all layers of a block); such tensors
                        have no gaps between pages
    Writes in place on the current stream, no synchronisation: may be captured. Ids are not checked against the number
    of pages: that would wait for the device. A tensor over a peer's memory is of this device too.
    Raises KernelInputError.
    """
    _check_ids(source, source_ids=source_ids, target_ids=target_ids)
    require(source_ids.shape == target_ids.shape, "target_ids", tuple(target_ids.shape), f"{tuple(source_ids.shape)}")
    _copy(_Side(source, source_ids, run_pages), _Side(target, target_ids, run_pages), len(source_ids))


def gather_pages(source: Tensor, ids: Tensor, out: Tensor, *, run_pages: int = 1) -> None:
    """Page (or run of pages) ids[i] of `source` becomes the i-th piece of `out`, a contiguous buffer of any shape and
    of just so many bytes. Otherwise as `copy_pages`.
    """
    _check_ids(source, ids=ids)
    _copy(_Side(source, ids, run_pages), _buffer("out", out, len(ids)), len(ids))


def scatter_pages(source: Tensor, target: Tensor, ids: Tensor, *, run_pages: int = 1) -> None:
    """The i-th piece of `source`, a contiguous buffer, becomes page (or run of pages) ids[i] of `target`; as above."""
    _check_ids(source, ids=ids)
    _copy(_buffer("source", source, len(ids)), _Side(target, ids, run_pages), len(ids))


@dataclass(frozen=True, slots=True)
class _Side:
    """Where copies come from or go to."""

    pages: Tensor
    ids: Tensor | None
    """None: the i-th copy is at i."""
    run_pages: int

    @property
    def stride_bytes(self) -> int:
        """From one id to the next."""
        return self.pages.stride(0) * self.pages.element_size()

    def words(self, word_bytes: int) -> Tensor:
        """A tensor of that type that begins where the pages do; the kernel does its own arithmetic from there."""
        return self.pages[:1].reshape(-1).view(_WORDS[word_bytes])


def _buffer(name: str, buffer: Tensor, n_copies: int) -> _Side:
    require(buffer.is_contiguous(), name, f"strides {buffer.stride()}", "a contiguous tensor")
    rows = max(1, n_copies)
    require(buffer.numel() % rows == 0, name, f"{buffer.numel()} elements", f"a multiple of the {rows} ids")
    return _Side(buffer.view(rows, buffer.numel() // rows), None, 1)


def _check_ids(pages: Tensor, **ids: Tensor) -> None:
    for name, one in ids.items():
        require(one.dim() == 1 and one.is_contiguous(), name, f"{tuple(one.shape)}", "contiguous [n]")
        require(one.dtype in (torch.int32, torch.int64), name, one.dtype, "int32 or int64")
    require_same_device(pages, **ids)


def _copy(source: _Side, target: _Side, n_copies: int) -> None:
    require_same_device(source.pages, target=target.pages)
    n_bytes, target_bytes = _copy_bytes("source", source), _copy_bytes("target", target)
    require(target_bytes == n_bytes, "target", f"{target_bytes} bytes a page", f"the source's {n_bytes}")
    if n_copies == 0 or n_bytes == 0:
        return
    sides = (source, target)
    places = [one.pages.data_ptr() for one in sides]
    word_bytes = math.gcd(8, n_bytes, source.stride_bytes, target.stride_bytes, *places)
    words = n_bytes // word_bytes
    few = n_copies * triton.cdiv(words, _SLICE_WORDS) < _ENOUGH_PROGRAMS
    block = _SMALL_SLICE_WORDS if few or words <= _SMALL_SLICE_WORDS else _SLICE_WORDS
    read, write = (one.words(word_bytes) for one in sides)
    _copy_words[(n_copies, triton.cdiv(words, block))](
        read, read if source.ids is None else source.ids, write, write if target.ids is None else target.ids,
        words, source.stride_bytes // word_bytes, target.stride_bytes // word_bytes,
        GATHER=source.ids is not None, SCATTER=target.ids is not None, BLOCK=block,
        num_warps=8 if block == _SLICE_WORDS else 4,
    )  # fmt: skip


def _copy_bytes(name: str, side: _Side) -> int:
    pages = side.pages
    require(pages.dim() >= 2, name, tuple(pages.shape), "[pages, ...]")
    require(pages[:1].is_contiguous(), name, f"strides {pages.stride()}", "contiguous pages")
    require(side.run_pages > 0, "run_pages", side.run_pages, "1 or more")
    page_bytes = math.prod(pages.shape[1:]) * pages.element_size()
    dense = side.stride_bytes == page_bytes or len(pages) == 1
    require(side.run_pages == 1 or dense, name, f"strides {pages.stride()}", "no gaps between pages, for runs of them")
    return side.run_pages * page_bytes


@triton.jit
def _copy_words(
    source: tl.tensor,
    source_ids: tl.tensor,
    target: tl.tensor,
    target_ids: tl.tensor,
    words: int,
    source_stride: int,
    target_stride: int,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    item = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    read_from, write_to = item, item
    if GATHER:
        read_from = tl.load(source_ids + item).to(tl.int64)
    if SCATTER:
        write_to = tl.load(target_ids + item).to(tl.int64)
    moved = tl.load(source + read_from * source_stride + at, mask=inside)
    tl.store(target + write_to * target_stride + at, moved, mask=inside)
