"""Reading and writing K and V in pages.

A pool of pages is one contiguous tensor [pages, 2, block_tokens, kv_heads, head_dim]; index 0 of the second dimension
is K, 1 is V. Two flat views of it make every access one operator:

    half pages   [2 * pages, block_tokens * kv_heads * head_dim]   page p's K is half 2p, its V half 2p + 1
    token rows   [2 * pages * block_tokens, kv_heads * head_dim]   slot s of half h is row h * block_tokens + s
"""

import torch
from torch import Tensor

from kernels.checks import require, require_same_device


class PageViews:
    """The two flat views of one pool. Holds no memory of its own; lives as long as the pool's tensor."""

    def __init__(self, pages: Tensor) -> None:
        require(
            pages.dim() == 5 and pages.shape[1] == 2,
            "pages",
            tuple(pages.shape),
            "[pages, 2, block_tokens, kv_heads, head_dim]",
        )
        require(pages.is_contiguous(), "pages", f"strides {pages.stride()}", "a contiguous tensor")
        n_pages, _, self.block_tokens, self.kv_heads, self.head_dim = pages.shape
        self.dtype = pages.dtype
        self._halves = pages.view(2 * n_pages, self.block_tokens * self.kv_heads * self.head_dim)
        self._rows = pages.view(2 * n_pages * self.block_tokens, self.kv_heads * self.head_dim)

    def write_into(self, rows: Tensor, keys_values: Tensor) -> None:
        """Set token rows: `rows` [n] int64, `keys_values` [n, kv_heads * head_dim], rounded to the pool's dtype.

        Rows must not repeat. Writes in place; everything else in the pool stays.
        """
        require(rows.dtype == torch.int64, "rows", rows.dtype, "int64")
        require_same_device(self._rows, rows=rows, keys_values=keys_values)
        self._rows.index_copy_(0, rows, keys_values.to(self.dtype))

    def gather_into(self, out: Tensor, halves: Tensor) -> Tensor:
        """Copy half pages: `halves` [..., blocks] int64 -> `out` [..., blocks * block_tokens, kv_heads, head_dim].

        `out` is contiguous, of the pool's dtype, and is returned.
        """
        shape = (*halves.shape[:-1], halves.shape[-1] * self.block_tokens, self.kv_heads, self.head_dim)
        require(out.shape == shape, "out", tuple(out.shape), f"{shape}")
        require(out.dtype == self.dtype and out.is_contiguous(), "out", out.dtype, f"contiguous, of {self.dtype}")
        torch.index_select(self._halves, 0, halves.reshape(-1), out=out.view(-1, self._halves.shape[1]))
        return out
