"""Where K and V lie: in pages that a table names, or in one contiguous range for each sequence (virtual memory).

Both are plain descriptions of tensors that somebody else owns; making one copies nothing and starts nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import require, require_same_device


@dataclass(frozen=True, slots=True)
class PagedKv:
    """K and V of one layer in pages; the page of a token is `table[sequence, token // block_tokens] + page_shift`.

    pages  [pages, block_tokens, 2 (K, V), kv_heads, head_dim], contiguous
    table  int32 [sequences, blocks], rows contiguous; entries past a sequence's last block are never read
    """

    pages: Tensor
    table: Tensor
    page_shift: int = 0

    def __post_init__(self) -> None:
        pages, table = self.pages, self.table
        require(
            pages.dim() == 5 and pages.shape[2] == 2,
            "pages",
            pages.shape,
            "[pages, block_tokens, 2, kv_heads, head_dim]",
        )
        require(pages.is_contiguous(), "pages", pages.shape, "a contiguous tensor of that shape")
        require(table.dim() == 2 and table.dtype == torch.int32, "table", table.dtype, "int32 [sequences, blocks]")
        require(table.stride(1) == 1, "table", table.shape, "contiguous rows")
        require_same_device(pages, table=table)

    @property
    def keys(self) -> Tensor:
        """A tensor that begins with the first key."""
        return self.pages

    @property
    def values(self) -> Tensor:
        """A view that begins with the first value."""
        return self.pages[:, :, 1]

    @property
    def places(self) -> Tensor:
        """What the kernels look a sequence's memory up in."""
        return self.table

    @property
    def block_tokens(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads of K and of V."""
        return self.pages.shape[3]

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.pages.shape[4]

    @property
    def token_elements(self) -> int:
        """Elements from one token's K to the next one's."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def page_elements(self) -> int:
        """Elements from one page to the next."""
        return self.block_tokens * self.token_elements


@dataclass(frozen=True, slots=True)
class ViewKv:
    """K and V of one layer in one range for each sequence, contiguous in addresses, as vTensor maps them.

    keys, values    flat tensors; element starts[sequence] + token * token_elements + head * head_dim + d of either
                    belongs to that sequence; what no such element is may be unmapped and is never read
    starts          int64 [sequences], multiples of 16 elements
    token_elements  from one token to the next; at least kv_heads * head_dim and a multiple of 16 for speed
    Source: vTensor (arXiv 2407.15309).
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    kv_heads: int
    head_dim: int
    token_elements: int

    def __post_init__(self) -> None:
        for name, flat in (("keys", self.keys), ("values", self.values)):
            require(flat.dim() == 1, name, f"{flat.dim()} dimensions", "a flat tensor")
            require(flat.stride(0) == 1, name, f"stride {flat.stride(0)}", "neighbouring elements")
        require(self.values.dtype == self.keys.dtype, "values", self.values.dtype, f"keys' {self.keys.dtype}")
        require(self.starts.dim() == 1, "starts", f"{self.starts.dim()} dimensions", "[sequences]")
        require(self.starts.dtype == torch.int64, "starts", self.starts.dtype, "int64")
        least = self.kv_heads * self.head_dim
        require(self.token_elements >= least, "token_elements", self.token_elements, f"at least {least}")
        require_same_device(self.keys, values=self.values, starts=self.starts)

    @property
    def places(self) -> Tensor:
        """What the kernels look a sequence's memory up in."""
        return self.starts


KvSource = PagedKv | ViewKv


def check_query(query: Tensor, kv: KvSource, sequences: int, **integers: Tensor) -> None:
    """Raise KernelInputError unless query [rows, heads, head_dim] and the int32 tensors fit `kv` of `sequences`."""
    require(query.dim() == 3, "query", query.shape, "[rows, heads, head_dim]")
    require(query.stride(2) == 1, "query", query.shape, "contiguous heads")
    require(query.shape[2] == kv.head_dim, "query", query.shape, "the head_dim of the pages")
    require(query.shape[1] % kv.kv_heads == 0, "query", query.shape, "a multiple of the kv heads as heads")
    require(kv.places.shape[0] >= sequences, "kv", kv.places.shape, "a row for each sequence")
    for name, one in integers.items():
        require(one.dtype == torch.int32 and one.dim() == 1, name, one.dtype, "int32 of one dimension")
    require_same_device(query, keys=kv.keys, places=kv.places, **integers)
