"""What the Triton attention kernels share: where a tile's tokens lie, what a score becomes, one step of online softmax.

Scores are held in units of log2 (exp2 is the hardware's own), results leave as natural logarithms.
Sources: online softmax (arXiv 1805.02867), FlashAttention-2 (arXiv 2307.08691).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_source import KvSource, PagedKv

_INTERPRETER_PROCESSORS = 2
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def look_up(
    tokens: tl.tensor,
    end: tl.tensor,
    place: tl.tensor,
    PAGED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> tl.tensor:
    """What the table at `place` says of each token before `end`: its page; of a view: the start of the sequence.

    Loops look pages up one tile ahead: an address that waits for a load of its own halves the copies in flight.
    """
    if PAGED:
        found = tl.load(place + tokens // BLOCK_TOKENS, mask=tokens < end, other=0)
    else:
        found = tl.multiple_of(tl.load(place), 16)
    return found


@triton.jit
def token_rows(
    found: tl.tensor,
    tokens: tl.tensor,
    page_shift: tl.tensor,
    PAGED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr,
    TOKEN_ELEMENTS: tl.constexpr,
) -> tl.tensor:
    """Offset of the row of each token, elements, from what `look_up` found."""
    if PAGED:
        rows = (found.to(tl.int64) + page_shift) * PAGE_ELEMENTS + (tokens % BLOCK_TOKENS) * TOKEN_ELEMENTS
    else:
        rows = found + tokens.to(tl.int64) * TOKEN_ELEMENTS
    return rows


@triton.jit
def load_rows(
    base: tl.tensor,
    rows: tl.tensor,
    dims: tl.tensor,
    seen: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Rows [tokens, BLOCK_DIM] of K or V. What is not seen reads as 0: unwritten memory may hold NaN, and 0 * NaN is NaN."""
    pointers = base + rows[:, None] + dims[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_DIM:
            loaded = tl.load(pointers, mask=seen[:, None], other=0.0)
        else:
            loaded = tl.load(pointers, mask=seen[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    else:
        if HEAD_DIM == BLOCK_DIM:
            loaded = tl.load(pointers)
        else:
            loaded = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return loaded


@triton.jit
def scored(products: tl.tensor, scaling: tl.tensor, SOFT_CAP: tl.constexpr) -> tl.tensor:
    """(values, factor): factor * values are the scores in units of log2, and factor > 0.

    A score is scaling * q.k, or soft_cap * tanh(scaling * q.k / soft_cap). Kept apart because value * factor - highest
    is one instruction, and the highest value needs no product.
    """
    if SOFT_CAP > 0.0:
        squared = tl.exp2(products * (scaling * (2.0 * 1.4426950408889634 / SOFT_CAP)))  # e^2x; inf gives tanh = 1
        values = 1.0 - 2.0 / (1.0 + squared)
        factor = SOFT_CAP * 1.4426950408889634
    else:
        values = products
        factor = scaling * 1.4426950408889634
    return values, factor


@triton.jit
def softmax_step(values: tl.tensor, factor: tl.tensor, highest: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Take one tile of scores in; returns (weights, what the sums so far shrink by, highest, total)."""
    raised = tl.maximum(highest, tl.max(values, 1) * factor)
    shift = tl.where(raised == float("-inf"), 0.0, raised)  # a row without a seen key so far: -inf - -inf is NaN
    weights = tl.exp2(values * factor - shift[:, None])
    shrink = tl.exp2(highest - shift)
    return weights, shrink, raised, total * shrink + tl.sum(weights, 1)


@triton.jit
def finished(sums: tl.tensor, highest: tl.tensor, total: tl.tensor) -> tl.tensor:
    """(out, natural lse) of finished rows; a row that saw nothing has out 0 and lse -inf."""
    some = total > 0.0
    out = sums / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (highest + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    return out, lse


def ceiling(dividend: int, divisor: int) -> int:
    """Quotient rounded up. Triton's own, which kernels may call too, takes the host ten times as long."""
    return -(-dividend // divisor)


def power_of_two(least: int) -> int:
    """The smallest that is not below `least`."""
    return 1 << (least - 1).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; programs that many times over keep the device busy."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def takes_large_tiles(device: torch.device) -> bool:
    """Whether a program may have 227 KiB of shared memory, as on Hopper and on Blackwell for data centres."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def source_constants(kv: KvSource) -> dict[str, int | bool]:
    """The compile-time constants that say how `kv` is laid out."""
    paged = isinstance(kv, PagedKv)
    return {
        "PAGED": paged,
        "BLOCK_TOKENS": kv.block_tokens if isinstance(kv, PagedKv) else 1,
        "PAGE_ELEMENTS": kv.page_elements if isinstance(kv, PagedKv) else 0,
        "TOKEN_ELEMENTS": kv.token_elements,
        "HEAD_DIM": kv.head_dim,
        "BLOCK_DIM": max(16, power_of_two(kv.head_dim)),
    }


def dot_constants(query: Tensor) -> dict[str, Any]:
    """Compile-time constants of the matrix products: their operands' dtype, and exact products for float32.

    The interpreter cannot multiply bfloat16, so there operands are widened first.
    """
    wide = query.dtype == torch.float32 or INTERPRETED
    narrow = tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16
    return {"DOT": tl.float32 if wide else narrow, "PRECISION": "ieee" if wide else "tf32"}


def rule_constants(window_tokens: int | None, soft_cap: float | None) -> dict[str, int | float]:
    """The compile-time constants of the rules that need none where they are 0."""
    return {"WINDOW": window_tokens or 0, "SOFT_CAP": float(soft_cap or 0.0)}
