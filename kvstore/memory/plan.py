"""How a memory budget divides into chunks, pages and tokens. Pure arithmetic; printed when a worker starts."""

import math
from dataclasses import dataclass

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.units import KIB, MIB, MemoryShare, format_bytes

HOST_CHUNK_BYTES = 2 * MIB
HOST_LEAST_PAGE_BYTES = 64 * KIB
"""Pages that are mapped one by one on the host: shorter ones use up the mappings that the kernel gives."""
_DEVICE_CHUNK_BYTES = 64 * MIB
_MIN_DEVICE_CHUNKS = 16
_BLOCK_STEP_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What `--device-memory` buys for one model."""

    budget_bytes: int
    """As asked for; what exceeds whole chunks is never taken."""
    chunk_bytes: int
    chunks: int
    limit_chunks: int
    """To how many the memory may be resized: it has addresses for so many."""
    page_bytes: int
    pages: int
    tokens: int
    """Whole token blocks over all layers."""

    def __str__(self) -> str:
        """One readable line."""
        return (
            f"{format_bytes(self.budget_bytes)}: {self.chunks} chunks of {format_bytes(self.chunk_bytes)}, "
            f"{self.pages} pages of {format_bytes(self.page_bytes)}, KV of {self.tokens} tokens"
        )


def kv_budget(total_bytes: int, share: MemoryShare, weights_bytes: int, workspace_bytes: int) -> int:
    """What a share of all memory leaves for KV once the model and the largest step's workspace have theirs.

    `weights_bytes`: what of `total_bytes` is taken already. Raises ConfigError, with the numbers, if nothing is left.
    """
    left_bytes = share.of(total_bytes) - weights_bytes - workspace_bytes
    if left_bytes <= 0:
        needed = 100 * (weights_bytes + workspace_bytes) / max(1, total_bytes)
        way_out = f"give more than {needed:.0f}%" if needed < 100 else "take a smaller model or a larger device"
        raise ConfigError(
            f"--device-memory={share} is {format_bytes(share.of(total_bytes))} of {format_bytes(total_bytes)}; weights "
            f"take {format_bytes(weights_bytes)} and a step {format_bytes(workspace_bytes)}, so nothing is left for KV: "
            f"{way_out}"
        )
    return left_bytes


def device_chunk_bytes(budget_bytes: int) -> int:
    """About how long chunks of an accelerator are: each is a descriptor of its own, so few; but enough to resize by."""
    return min(_DEVICE_CHUNK_BYTES, budget_bytes // _MIN_DEVICE_CHUNKS)


def chunk_bytes_for(page_bytes: int, granularity_bytes: int, near_bytes: int) -> int:
    """Chunk length nearest to `near_bytes` that whole pages and whole mappable units fill exactly.

    So a page never lies across two chunks, which need not be neighbours in the file.
    """
    unit_bytes = math.lcm(page_bytes, granularity_bytes)
    return max(1, round(near_bytes / unit_bytes)) * unit_bytes


def _page_chunk_bytes(layout: KvLayout, granularity_bytes: int) -> int:
    if layout.page_bytes % granularity_bytes:
        tokens = virtual_block_tokens(layout.kv_heads, layout.head_dim, layout.dtype, granularity_bytes)
        raise ConfigError(
            f"pages of {layout.block_tokens} tokens are {format_bytes(layout.page_bytes)}, and memory is mapped in units "
            f"of {format_bytes(granularity_bytes)}: the virtual layout needs blocks of a multiple of {tokens} tokens here"
        )
    return layout.page_bytes


def virtual_block_tokens(
    kv_heads: int, head_dim: int, dtype: str, granularity_bytes: int, least_page_bytes: int = 0
) -> int:
    """Tokens of a block whose pages can be mapped one by one: the fewest, in sixteens, that fill whole mappable units.

    A page is K and V of one layer; it has at least `least_page_bytes`.
    """
    token_bytes = KvLayout(layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_tokens=1).page_bytes
    unit_bytes = math.lcm(granularity_bytes, _BLOCK_STEP_TOKENS * token_bytes)
    return max(1, -(-least_page_bytes // unit_bytes)) * unit_bytes // token_bytes


def memory_plan(
    budget_bytes: int,
    layout: KvLayout,
    granularity_bytes: int,
    near_bytes: int | None,
    *,
    limit_bytes: int = 0,
) -> MemoryPlan:
    """Divide the budget into chunks of about `near_bytes`, or, if that is None, of one page each, so that a sequence's
    pages can be mapped in its own order.

    `limit_bytes`: what it may be resized to; less than the budget means the budget. Raises ConfigError if not even one
    token block fits, or if pages that shall be chunks are not whole mappable units.
    """
    if near_bytes is None:
        chunk_bytes = _page_chunk_bytes(layout, granularity_bytes)
    else:
        chunk_bytes = chunk_bytes_for(layout.page_bytes, granularity_bytes, near_bytes)
    chunks = budget_bytes // chunk_bytes
    pages = chunks * (chunk_bytes // layout.page_bytes)
    tokens = pages // layout.layers * layout.block_tokens
    if tokens == 0:
        needed_chunks = -(-layout.layers * layout.page_bytes // chunk_bytes)
        raise ConfigError(
            f"--device-memory={format_bytes(budget_bytes)} does not hold {layout.block_tokens} tokens: "
            f"give at least {format_bytes(needed_chunks * chunk_bytes)} "
            f"({layout.layers} pages of {format_bytes(layout.page_bytes)}, in chunks of {format_bytes(chunk_bytes)})"
        )
    return MemoryPlan(
        budget_bytes=budget_bytes,
        chunk_bytes=chunk_bytes,
        chunks=chunks,
        limit_chunks=max(chunks, limit_bytes // chunk_bytes),
        page_bytes=layout.page_bytes,
        pages=pages,
        tokens=tokens,
    )
