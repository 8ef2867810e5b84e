"""The passes over a row of which `kernels.choose` makes its searches (Triton)."""

import triton
import triton.language as tl

from kernels.choose_scores import LARGEST, distances, mass_of, row_likeliest

GREEDY_BELOW = tl.constexpr(1e-5)
COARSE_BINS = tl.constexpr(2048)
COARSE_SHIFT = tl.constexpr(16)
COARSE_WIDTH = tl.constexpr(2**16)
COARSE_FIRST = tl.constexpr(0x4200 - 2048)  # the last bin ends at a distance of 32, where no mass is left
FINE_BITS = tl.constexpr(10)
FINE_BINS = tl.constexpr(1024)
ID_BINS = tl.constexpr(1024)
IDS_EACH = tl.constexpr(512)

# What a row keeps between passes, in 64-bit words. All is zero at first.
COARSE_MASS = tl.constexpr(0)
COARSE_COUNT = tl.constexpr(2048)
FINE_MASS = tl.constexpr(4096)  # nine passes
FINE_COUNT = tl.constexpr(4096 + 9 * 1024)  # three passes
TIED = tl.constexpr(4096 + 12 * 1024)
STATES = tl.constexpr(4096 + 13 * 1024)  # ten states of eight words
WITHIN_MIN_P = tl.constexpr(4096 + 13 * 1024 + 80)
LIKELIEST = tl.constexpr(4096 + 13 * 1024 + 81)
ROW_WORDS = tl.constexpr(4096 + 13 * 1024 + 96)

STATE_WORDS = tl.constexpr(8)
LEVELS = tl.constexpr(3)  # passes of a search after the coarse one

BY_COUNT = tl.constexpr(0)
BY_TOP_P = tl.constexpr(1)
BY_CHANCE = tl.constexpr(2)

NOT_NEEDED = tl.constexpr(0)
SEARCHING = tl.constexpr(1)
FOUND = tl.constexpr(2)


@triton.jit
def _add_to_bins(bins: tl.tensor, bin_: tl.tensor, amount: tl.tensor, counted: tl.tensor) -> None:
    """bins[bin_] += amount where counted. Equal scores are common; a tile of one bin is added up first."""
    lowest = tl.min(tl.where(counted, bin_, 2147483647), axis=0)
    highest = tl.max(tl.where(counted, bin_, -1), axis=0)
    if lowest == highest:
        tl.atomic_add(bins + lowest, tl.sum(tl.where(counted, amount, 0), axis=0), sem="relaxed")
    else:
        tl.atomic_add(bins + bin_, amount, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=["tiles_each", "parts"])
def fill_coarse(
    logits: tl.tensor,
    scratch: tl.tensor,
    temperatures: tl.tensor,
    vocab: int,
    stride: int,
    tiles_each: int,
    top_k: tl.tensor,
    min_p: tl.tensor,
    best: tl.tensor,
    best_at: tl.tensor,
    tokens: tl.tensor,
    parts: int,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Greedy rows are done here. Of the others: mass, and if a cut needs it number, of the tokens in coarse bins."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    likeliest, token = row_likeliest(best + row * parts, best_at + row * parts, parts, PARTS)
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        tl.store(tokens + row, token.to(tl.int64), mask=part == 0)
        return
    likeliest = tl.maximum(likeliest, -LARGEST)
    kept = scratch + row * ROW_WORDS
    tl.store(kept + LIKELIEST, likeliest.to(tl.int32, bitcast=True).to(tl.int64), mask=part == 0)
    least = tl.load(min_p + row)
    farthest = -tl.log(tl.where(least > 0.0, least, 1.0).to(tl.float64)).to(tl.float32)
    needs_counts = (least > 0.0) | (tl.load(top_k + row) > 0)
    at = part * tiles_each * TILE + tl.arange(0, TILE)
    within = tl.zeros([TILE], tl.int64)
    for _ in range(tiles_each):
        distance = distances(logits + row * stride, at, vocab, likeliest, temperature)
        mass = mass_of(distance)
        bin_ = tl.maximum((distance.to(tl.int32, bitcast=True) >> COARSE_SHIFT) - COARSE_FIRST, 0)
        bin_ = tl.minimum(bin_, COARSE_BINS - 1)
        _add_to_bins(kept + COARSE_MASS, bin_, mass, mass > 0)
        if needs_counts:
            _add_to_bins(kept + COARSE_COUNT, bin_, tl.full([TILE], 1, tl.int64), mass > 0)
            within += ((distance <= farthest) & (at < vocab)).to(tl.int64)
        at += TILE
    if needs_counts:
        tl.atomic_add(kept + WITHIN_MIN_P, tl.sum(within, axis=0), sem="relaxed")


@triton.jit
def _first_reaching(bins: tl.tensor, target: tl.tensor, BINS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(first bin up to which the sum is at least the target, sum before it)."""
    reached = tl.cumsum(tl.load(bins + tl.arange(0, BINS)), axis=0)
    short = reached < target
    bin_ = tl.minimum(tl.sum(short.to(tl.int32), axis=0), BINS - 1)
    return bin_, tl.max(tl.where(short, reached, 0), axis=0)


@triton.jit
def _sum_before(bins: tl.tensor, bin_: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    at = tl.arange(0, BINS)
    return tl.sum(tl.load(bins + at, mask=at < bin_, other=0), axis=0)


@triton.jit
def _descend(kept: tl.tensor, pass_at: int, COUNTED: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The state after a pass: (step, low, high, shift, left, mass before).

    The place lies among keys low <= key < high, and is where `left` more, in the measure of the search (tokens or
    mass), are reached. FOUND: it is among the tokens whose key is `low`.
    """
    state = kept + STATES + pass_at * STATE_WORDS
    step, low, high = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    shift, left, before = tl.load(state + 3), tl.load(state + 4), tl.load(state + 5)
    masses = kept + FINE_MASS + pass_at * FINE_BINS
    if COUNTED:
        bin_, skipped = _first_reaching(kept + FINE_COUNT + pass_at * FINE_BINS, left, FINE_BINS)
        skipped_mass = _sum_before(masses, bin_, FINE_BINS)
    else:
        bin_, skipped = _first_reaching(masses, left, FINE_BINS)
        skipped_mass = skipped
    searching = step == SEARCHING
    low = tl.where(searching, low + (bin_.to(tl.int64) << shift), low)
    high = tl.where(searching, tl.minimum(high, low + (tl.full([], 1, tl.int64) << shift)), high)
    left = tl.where(searching, left - skipped, left)
    before = tl.where(searching, before + skipped_mass, before)
    step = tl.where(searching & (shift == 0), FOUND, step)
    return step, low, high, tl.maximum(shift - FINE_BITS, 0), left, before


@triton.jit
def _end(kept: tl.tensor, SEARCH: tl.constexpr) -> tuple[tl.tensor, ...]:
    """What a search came to: (step, key, which of the tokens of that key, mass up to there)."""
    step, key, _, _, left, before = _descend(kept, SEARCH * LEVELS + LEVELS - 1, SEARCH == BY_COUNT)
    each = tl.maximum(mass_of(key.to(tl.int32).to(tl.float32, bitcast=True)), 1)
    rank = left
    if SEARCH != BY_COUNT:
        rank = (left + each - 1) // each
    return step, key, rank, tl.where(step == FOUND, before + rank * each, before)


@triton.jit
def _target(
    kept: tl.tensor,
    row: tl.tensor,
    vocab: int,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    chances: tl.tensor,
    SEARCH: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """(whether the search is needed, what it must reach, the mass that is kept if it is not)."""
    if SEARCH == BY_COUNT:
        mass = _sum_before(kept + COARSE_MASS, COARSE_BINS, COARSE_BINS)
        asked, within = tl.load(top_k + row).to(tl.int64), tl.maximum(tl.load(kept + WITHIN_MIN_P), 1)
        target = tl.where(asked > 0, asked, vocab)
        target = tl.where(tl.load(min_p + row) > 0.0, tl.minimum(target, within), target)
        needed = target < _sum_before(kept + COARSE_COUNT, COARSE_BINS, COARSE_BINS)
    else:
        _, _, _, mass = _end(kept, SEARCH - 1)
        if SEARCH == BY_TOP_P:
            share = tl.load(top_p + row)
            target = tl.ceil(share.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
            needed = (share < 1.0) & (mass > 0)
        else:
            target = tl.floor(tl.load(chances + row) * mass.to(tl.float64)).to(tl.int64) + 1
            needed = mass > 0
        target = tl.maximum(tl.minimum(target, mass), 1)
    return needed, target, mass


@triton.jit
def _coarse_state(
    kept: tl.tensor, needed: tl.tensor, target: tl.tensor, mass: tl.tensor, SEARCH: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The state of a search after the coarse pass; shaped as `_descend` returns it."""
    if SEARCH == BY_COUNT:
        bin_, skipped = _first_reaching(kept + COARSE_COUNT, target, COARSE_BINS)
        skipped_mass = _sum_before(kept + COARSE_MASS, bin_, COARSE_BINS)
    else:
        bin_, skipped = _first_reaching(kept + COARSE_MASS, target, COARSE_BINS)
        skipped_mass = skipped
    edge = (bin_.to(tl.int64) + COARSE_FIRST) << COARSE_SHIFT
    low = tl.where(bin_ == 0, 0, edge)
    high = edge + COARSE_WIDTH
    shift = tl.where(bin_ == 0, 30 - FINE_BITS, COARSE_SHIFT - FINE_BITS).to(tl.int64)
    step = tl.where(needed, SEARCHING, NOT_NEEDED).to(tl.int64)
    return step, low, high, shift, target - skipped, tl.where(needed, skipped_mass, mass)


@triton.jit(do_not_specialize=["tiles_each"])
def begin(
    logits: tl.tensor,
    scratch: tl.tensor,
    temperatures: tl.tensor,
    vocab: int,
    stride: int,
    tiles_each: int,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    chances: tl.tensor,
    SEARCH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The first pass of a search: ends the search before, finds the coarse bin and fills the fine bins within it."""
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    kept = scratch + row * ROW_WORDS
    needed, target, total = _target(kept, row, vocab, top_k, top_p, min_p, chances, SEARCH)
    step, low, high, shift, left, before = _coarse_state(kept, needed, target, total, SEARCH)
    PASS: tl.constexpr = SEARCH * LEVELS
    _keep_state(kept, PASS, step, low, high, shift, left, before)
    if step == SEARCHING:
        _fill_fine(kept, logits + row * stride, vocab, tiles_each, temperature, low, high, shift,
                   PASS, SEARCH == BY_COUNT, TILE)  # fmt: skip


@triton.jit(do_not_specialize=["tiles_each", "pass_at"])
def narrow(
    logits: tl.tensor,
    scratch: tl.tensor,
    temperatures: tl.tensor,
    vocab: int,
    stride: int,
    tiles_each: int,
    pass_at: int,
    COUNTED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A later pass of a search: finds the fine bin of the pass before and fills the finer ones within it."""
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    kept = scratch + row * ROW_WORDS
    step, low, high, shift, left, before = _descend(kept, pass_at - 1, COUNTED)
    _keep_state(kept, pass_at, step, low, high, shift, left, before)
    if step == SEARCHING:
        _fill_fine(kept, logits + row * stride, vocab, tiles_each, temperature, low, high, shift,
                   pass_at, COUNTED, TILE)  # fmt: skip


@triton.jit
def _keep_state(
    kept: tl.tensor,
    pass_at: int,
    step: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    shift: tl.tensor,
    left: tl.tensor,
    before: tl.tensor,
) -> None:
    """All programs of a row come to the same state; its first one writes it down."""
    state = kept + STATES + pass_at * STATE_WORDS
    if tl.program_id(0) == 0:
        tl.store(state, step)
        tl.store(state + 1, low)
        tl.store(state + 2, high)
        tl.store(state + 3, shift)
        tl.store(state + 4, left)
        tl.store(state + 5, before)


@triton.jit
def _fill_fine(
    kept: tl.tensor,
    logits: tl.tensor,
    vocab: int,
    tiles_each: int,
    temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    shift: tl.tensor,
    pass_at: int,
    COUNTED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Mass, and if COUNTED number, of this part's tokens with low <= key < high, in bins of 2^shift keys."""
    likeliest = tl.load(kept + LIKELIEST).to(tl.int32).to(tl.float32, bitcast=True)
    at = tl.program_id(0) * tiles_each * TILE + tl.arange(0, TILE)
    first, end, width = low.to(tl.int32), high.to(tl.int32), shift.to(tl.int32)
    for _ in range(tiles_each):
        distance = distances(logits, at, vocab, likeliest, temperature)
        key = distance.to(tl.int32, bitcast=True)
        mass = mass_of(distance)
        sought = (key >= first) & (key < end) & (mass > 0)
        if tl.sum(sought.to(tl.int32), axis=0) > 0:
            bin_ = tl.where(sought, (key - first) >> width, 0)
            _add_to_bins(kept + FINE_MASS + pass_at * FINE_BINS, bin_, mass, sought)
            if COUNTED:
                ones = tl.full([TILE], 1, tl.int64)
                _add_to_bins(kept + FINE_COUNT + pass_at * FINE_BINS, bin_, ones, sought)
        at += TILE


@triton.jit(do_not_specialize=["tiles_each"])
def count_tied(
    logits: tl.tensor,
    scratch: tl.tensor,
    temperatures: tl.tensor,
    vocab: int,
    stride: int,
    tiles_each: int,
    TILE: tl.constexpr,
) -> None:
    """How many tokens of the key that was drawn there are among every so many ids."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    kept = scratch + row * ROW_WORDS
    step, key, rank, _ = _end(kept, BY_CHANCE)
    if part == 0:
        state = kept + STATES + 9 * STATE_WORDS
        tl.store(state, step)
        tl.store(state + 1, key)
        tl.store(state + 2, rank)
    if step != FOUND:
        return
    likeliest = tl.load(kept + LIKELIEST).to(tl.int32).to(tl.float32, bitcast=True)
    GROUPS: tl.constexpr = TILE // IDS_EACH
    group = part * tiles_each * GROUPS + tl.arange(0, GROUPS)
    for _ in range(tiles_each):
        at = group[:, None] * IDS_EACH + tl.arange(0, IDS_EACH)[None, :]
        distance = distances(logits + row * stride, at, vocab, likeliest, temperature)
        tied = distance.to(tl.int32, bitcast=True) == key.to(tl.int32)
        tl.store(kept + TIED + group, tl.sum(tied.to(tl.int64), axis=1), mask=group < ID_BINS)
        group += GROUPS


@triton.jit
def take_tied(
    logits: tl.tensor, scratch: tl.tensor, temperatures: tl.tensor, vocab: int, stride: int, tokens: tl.tensor
) -> None:
    """The token of a row that was drawn: the one of that rank among the equals."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    kept = scratch + row * ROW_WORDS
    state = kept + STATES + 9 * STATE_WORDS
    step, key, rank = tl.load(state), tl.load(state + 1).to(tl.int32), tl.load(state + 2)
    likeliest = tl.load(kept + LIKELIEST).to(tl.int32).to(tl.float32, bitcast=True)
    equals = _sum_before(kept + TIED, ID_BINS, ID_BINS)
    rank = tl.minimum(rank, equals)
    group, before = _first_reaching(kept + TIED, rank, ID_BINS)
    at = group * IDS_EACH + tl.arange(0, IDS_EACH)
    distance = distances(logits + row * stride, at, vocab, likeliest, temperature)
    tied = (distance.to(tl.int32, bitcast=True) == key).to(tl.int64)
    chosen = (tied == 1) & (tl.cumsum(tied, axis=0) == rank - before)
    token = tl.sum(tl.where(chosen, at, 0), axis=0).to(tl.int64)
    tl.store(tokens + row, tl.where(step == FOUND, token, 0))
