"""Choosing the next token of every row of a batch on the device, without waiting for it (Triton).

The meaning is that of drawing by sorting (`kernels.reference_ops.choose_tokens`): order by falling score, ties by
rising id; min-p, top-k and top-p each keep a prefix; then the place where the mass passes `chance` of what is kept.

Nothing is sorted. A score is at a distance from the likeliest, a float32 of 0 or more, whose bits rise with it: a key
of 31 bits. A place in the order is found by a radix search over keys: one pass over the row adds what each bin of keys
weighs, the next one looks only into the bin where the place lies. Three searches follow one another (where the cuts by
count end, where top-p ends, where the draw ends), each of three passes after the one that they share. Masses are
integers, in units of 2^-43 of the likeliest token's: their sums do not depend on the order of addition, so that a row's
token depends on that row alone, whatever the batch and the number of programs.
Source of the search: radix selection, Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.checks import require, require_same_device
from kernels.choose_passes import (
    BY_CHANCE,
    BY_COUNT,
    BY_TOP_P,
    LEVELS,
    ROW_WORDS,
    begin,
    count_tied,
    fill_coarse,
    narrow,
    take_tied,
)
from kernels.choose_scores import part_likeliest

_TILE = 2048
_PROGRAMS = 1024
"""Rows are cut into parts until there are about so many programs."""
_MOST_TILES = 256
_LONGEST_ROW = _TILE * _MOST_TILES
"""Masses of more tokens could exceed 63 bits."""


def choose_tokens(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, chances: Tensor
) -> Tensor:
    """The next token of each row: the likeliest, or one drawn from the row's truncated distribution.

    logits        [rows, vocab], elements of a row contiguous, vocab up to 524288; any logits will do: nan counts as
                  -inf, +inf as the largest number there is; a row of nothing but -inf gives 0
    temperatures  float32 [rows]; below 1e-5 the row takes its likeliest token, the first of equals
    top_k         int32 [rows]; 0: no cut
    top_p         float32 [rows]; 1: no cut
    min_p         float32 [rows]; 0: no cut. Keeps tokens at least so likely relative to the likeliest
    chances       float64 [rows] in [0, 1): where in the distribution the draw falls
    Returns int64 [rows], a new tensor. Current stream, no synchronisation: may be captured in a CUDA graph.

    Tokens less likely than 2^-43 of the likeliest are not drawn. Draws nearer to the border of two tokens than about
    1e-6 of the mass may fall to the other side than those of another device: exponentials differ in their last bits.
    Raises KernelInputError.
    """
    rows, vocab = _check(logits)
    parameters = {
        "temperatures": (temperatures, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "chances": (chances, torch.float64),
    }
    for name, (one, dtype) in parameters.items():
        require(one.shape == (rows,) and one.is_contiguous(), name, tuple(one.shape), f"contiguous [{rows}]")
        require(one.dtype == dtype, name, one.dtype, str(dtype))
        require_same_device(logits, **{name: one})
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    cut = _cut(rows, vocab)
    best, best_at = _likeliest_of_parts(logits, cut)
    scratch = torch.zeros(rows, ROW_WORDS.value, dtype=torch.int64, device=logits.device)
    row = (logits, scratch, temperatures, vocab, logits.stride(0), cut.tiles_each)
    grid = (cut.parts, rows)
    fill_coarse[grid](*row, top_k, min_p, best, best_at, tokens, cut.parts, PARTS=_MOST_TILES, TILE=_TILE, num_warps=8)
    for search in (BY_COUNT.value, BY_TOP_P.value, BY_CHANCE.value):
        begin[grid](*row, top_k, top_p, min_p, chances, SEARCH=search, TILE=_TILE, num_warps=8)
        first = search * LEVELS.value
        for pass_at in range(first + 1, first + LEVELS.value):
            narrow[grid](*row, pass_at, COUNTED=search == BY_COUNT.value, TILE=_TILE, num_warps=8)
    count_tied[grid](*row, TILE=_TILE, num_warps=8)
    take_tied[(rows,)](*row[:-1], tokens, num_warps=4)
    return tokens


@dataclass(frozen=True, slots=True)
class _Cut:
    """How rows are cut into programs."""

    parts: int
    tiles_each: int


def _check(logits: Tensor) -> tuple[int, int]:
    require(logits.dim() == 2 and logits.is_floating_point(), "logits", tuple(logits.shape), "[rows, vocab] of floats")
    require(0 < logits.shape[1] <= _LONGEST_ROW, "logits", f"{logits.shape[1]} tokens", f"1 to {_LONGEST_ROW}")
    require(logits.stride(1) == 1, "logits", f"strides {logits.stride()}", "rows of contiguous elements")
    return logits.shape[0], logits.shape[1]


def _cut(rows: int, vocab: int) -> _Cut:
    tiles = triton.cdiv(vocab, _TILE)
    tiles_each = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, rows)))
    return _Cut(triton.cdiv(tiles, tiles_each), tiles_each)


def _likeliest_of_parts(logits: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """The largest logit of every part and where it is first: [rows, parts] float32 and int32."""
    rows, vocab = logits.shape
    best = torch.empty(rows, cut.parts, dtype=torch.float32, device=logits.device)
    best_at = torch.empty(rows, cut.parts, dtype=torch.int32, device=logits.device)
    part_likeliest[(cut.parts, rows)](
        logits, best, best_at, vocab, logits.stride(0), cut.tiles_each, TILE=_TILE, num_warps=8
    )
    return best, best_at
