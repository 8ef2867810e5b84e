"""Random sequences whose K and V lie scattered over pages and over views, with NaN wherever nothing was written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_source import PagedKv, ViewKv

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ON_DEVICE = [
    *(("paged", torch.bfloat16, head_dim) for head_dim in (64, 80, 96, 128, 256)),
    *(("paged", torch.float32, head_dim) for head_dim in (64, 128, 256)),
    ("paged", torch.float16, 128),
    ("view", torch.bfloat16, 128),
]
"""Each costs a compilation."""
BLOCK_TOKENS = 16
PAGE_SHIFT = 2


@dataclass(frozen=True)
class Scattered:
    """The same keys and values in both kinds of memory."""

    query: Tensor
    query_starts: Tensor
    lengths: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    paged: PagedKv
    view: ViewKv


def scatter(
    lengths: Sequence[int],
    queries: Sequence[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Scattered:
    chance = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance).to(dtype)

    sequences = [(drawn(n, kv_heads, head_dim), drawn(n, kv_heads, head_dim)) for n in lengths]
    blocks = [-(-n // BLOCK_TOKENS) for n in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=chance).tolist()
    pages = torch.full((len(order) + PAGE_SHIFT, BLOCK_TOKENS, 2, kv_heads, head_dim), torch.nan, dtype=dtype)
    table = torch.full((len(lengths), max(blocks) + 1), 2**30, dtype=torch.int32)
    row = (kv_heads + 1) * head_dim  # a stride that is more than the heads
    room = -(-(max(lengths) + 5) * row // 16) * 16
    flat = torch.full((2, len(lengths) * room), torch.nan, dtype=dtype)
    for s, (keys, values) in enumerate(sequences):
        for block in range(blocks[s]):
            page = table[s, block] = order.pop()
            part = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
            for side, one in enumerate((keys[part], values[part])):
                pages[page + PAGE_SHIFT, : len(one), side] = one
        for side, one in enumerate((keys, values)):
            tokens = flat[side, s * room : s * room + len(one) * row].view(len(one), row)
            tokens[:, : kv_heads * head_dim] = one.flatten(1)
    flat, pages = flat.to(device), pages.to(device)
    starts = torch.arange(len(lengths), dtype=torch.int64, device=device) * room
    begins = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    wide = drawn(sum(queries), 2, kv_heads * group, head_dim)  # heads lie inside a wider row, as after a fused product
    return Scattered(
        query=wide.to(device)[:, 1],
        query_starts=begins.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        keys_values=[(keys.to(device), values.to(device)) for keys, values in sequences],
        paged=PagedKv(pages, table.to(device), PAGE_SHIFT),
        view=ViewKv(flat[0], flat[1], starts, kv_heads, head_dim, row),
    )
