"""What `kernels.choose` reads of a row: its likeliest token, and how far below that one every other lies (Triton)."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
UNITS = tl.constexpr(float(2**43))


@triton.jit
def _usable(logits: tl.tensor, at: tl.tensor, vocab: int) -> tl.tensor:
    """Usable logits at these ids; -inf beyond the row."""
    value = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(value != value, float("-inf"), value), LARGEST)


@triton.jit
def distances(logits: tl.tensor, at: tl.tensor, vocab: int, likeliest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """How far below the likeliest scores lie, in nats: 0 or more, up to inf."""
    below = likeliest - _usable(logits, at, vocab)
    return tl.div_rn(below, tl.zeros_like(below) + temperature)


@triton.jit
def mass_of(distance: tl.tensor) -> tl.tensor:
    """What a token at that distance weighs, in units of 2^-43 of the likeliest one's mass."""
    return (tl.exp(-distance) * UNITS).to(tl.int64)


@triton.jit(do_not_specialize=["tiles_each"])
def part_likeliest(
    logits: tl.tensor,
    best: tl.tensor,
    best_at: tl.tensor,
    vocab: int,
    stride: int,
    tiles_each: int,
    TILE: tl.constexpr,
) -> None:
    """The largest logit of one part of a row, and where it is first."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * tiles_each * TILE + tl.arange(0, TILE)
    found = tl.full([TILE], float("-inf"), tl.float32)
    found_at = at
    for _ in range(tiles_each):
        value = _usable(logits + row * stride, at, vocab)
        better = value > found
        found = tl.where(better, value, found)
        found_at = tl.where(better, at, found_at)
        at += TILE
    largest = tl.max(found, axis=0)
    place = row * tl.num_programs(0) + part
    tl.store(best + place, largest)
    tl.store(best_at + place, tl.min(tl.where(found == largest, found_at, vocab), axis=0))


@triton.jit
def row_likeliest(best: tl.tensor, best_at: tl.tensor, parts: int, PARTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(largest logit, its first id) of one row from those of its parts."""
    part = tl.arange(0, PARTS)
    values = tl.load(best + part, mask=part < parts, other=float("-inf"))
    ids = tl.load(best_at + part, mask=part < parts, other=2147483647)
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where(values == largest, ids, 2147483647), axis=0)
