"""What a MemPool with `verify` does: every block that is copied is compared with what it was, before anybody may use the copy.

A block's checksums, one crc32 for each page, are made when it becomes visible, and kept until its memory is given out again:
so a copy shows what went wrong on the way, and also what went wrong where the block lay. A private block may change until it is
visible; its checksums are made just before the copy. A visible block that is not what it was when it came is found by nobody any
more; pinned, it stays until a copy of it fails without a pin.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.errors import KvCorrupt
from kvstore.pool.tier import Tier
from kvstore.pool.transfer import BlockCopy


class CheckedCopy:
    """Does what `copy` does between two tiers.

    Owns `checked_pages`, pages that were compared, and `wrong_pages`, those of them that were not what they had been; both for
    others to read. Owns what was found wrong where it lay, until the call of the pool is over.
    """

    def __init__(self, copy: BlockCopy, *, verify: bool) -> None:
        self._copy, self._verify = copy, verify
        self.checked_pages = self.wrong_pages = 0
        self._spoilt: list[tuple[Tier, int]] = []

    def __call__(self, into: Tier, to_blocks: Sequence[int], out_of: Tier, from_blocks: Sequence[int]) -> None:
        """Raises KvCorrupt, besides what `copy` raises, with nothing published yet."""
        expected = [out_of.kept_sums(block) or out_of.sums(block) for block in from_blocks] if self._verify else []
        self._copy(into.memory, to_blocks, out_of.memory, from_blocks)
        wrong = dict[int, int]()
        for from_block, to_block, kept in zip(from_blocks, to_blocks, expected, strict=False):
            n_wrong = sum(one != other for one, other in zip(kept, into.sums(to_block), strict=True))
            self.checked_pages += len(kept)
            if n_wrong:
                wrong[from_block] = n_wrong
                if out_of.sums(from_block) != kept:
                    self._spoilt.append((out_of, from_block))
        if wrong:
            self.wrong_pages += sum(wrong.values())
            text = f"{sum(wrong.values())} pages of {out_of.medium.value} blocks {sorted(wrong)[:8]}"
            raise KvCorrupt(f"{text} came otherwise than they were kept")

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a whole call of the pool: once its pins are gone, what was found wrong where it lay is visible no more."""
        try:
            yield
        finally:
            spoilt, self._spoilt = self._spoilt, []
            for tier, block in spoilt:
                name = tier.names.get(block)
                if name is not None:
                    tier.pool.forget([name])
