"""Reading and writing K and V in pages.

A pool of pages is one contiguous tensor [pages, block_tokens, 2, kv_heads, head_dim]; of a token, index 0 is K, 1 is V.
So pages that lie one behind the other hold their tokens at one stride. Two flat views make every access one operator:

    whole pages  [pages, block_tokens * 2 * kv_heads * head_dim]
    token rows   [pages * block_tokens, 2 * kv_heads * head_dim]   slot s of page p is row p * block_tokens + s: K, then V
"""

import torch
from torch import Tensor

from kernels.checks import require, require_same_device


class PageViews:
    """The two flat views of one pool. Holds no memory of its own; lives as long as the pool's tensor."""

    def __init__(self, pages: Tensor) -> None:
        require(
            pages.dim() == 5 and pages.shape[2] == 2,
            "pages",
            tuple(pages.shape),
            "[pages, block_tokens, 2, kv_heads, head_dim]",
        )
        require(pages.is_contiguous(), "pages", f"strides {pages.stride()}", "a contiguous tensor")
        n_pages, self.block_tokens, _, self.kv_heads, self.head_dim = pages.shape
        self.dtype = pages.dtype
        token_elements = 2 * self.kv_heads * self.head_dim
        self._pages = pages.view(n_pages, self.block_tokens * token_elements)
        self._rows = pages.view(n_pages * self.block_tokens, token_elements)

    def write_into(self, rows: Tensor, keys_values: Tensor) -> None:
        """Set token rows: `rows` [n] int64, `keys_values` [n, 2 * kv_heads * head_dim], rounded to the pool's dtype.

        Rows must not repeat. Writes in place; everything else in the pool stays.
        """
        require(rows.dtype == torch.int64, "rows", rows.dtype, "int64")
        require_same_device(self._rows, rows=rows, keys_values=keys_values)
        self._rows.index_copy_(0, rows, keys_values.to(self.dtype))

    def blank(self, rows: Tensor) -> None:
        """Set token rows [n] int64 to 0."""
        self._rows.index_fill_(0, rows, 0.0)

    def gather_into(self, out: Tensor, ids: Tensor) -> Tensor:
        """Copy pages: `ids` [..., blocks] int64 -> `out` [..., blocks * block_tokens, 2, kv_heads, head_dim].

        `out` is contiguous, of the pool's dtype, and is returned.
        """
        shape = (*ids.shape[:-1], ids.shape[-1] * self.block_tokens, 2, self.kv_heads, self.head_dim)
        require(out.shape == shape, "out", tuple(out.shape), f"{shape}")
        require(out.dtype == self.dtype and out.is_contiguous(), "out", out.dtype, f"contiguous, of {self.dtype}")
        torch.index_select(self._pages, 0, ids.reshape(-1), out=out.view(-1, self._pages.shape[1]))
        return out
