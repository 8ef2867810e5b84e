"""A map from block names to bits, where a bit can die at once and be forgotten by the map later, a few names at a time.

The map is cut into shards by the first byte of a name, so that no growing table keeps the event loop for long.
"""

from collections.abc import Iterable, Sequence

_N_SHARDS = 256  # values of a byte: the name's first one picks the shard


class BlockMasks:
    """Owns which bits each name carries and which bits are in use.

    A bit is taken, shown, retired; then `sweep` takes it off the names, and it can be taken again. `live` has the bits that
    are shown: whoever reads a mask masks it with that.
    """

    def __init__(self) -> None:
        self.shards: tuple[dict[bytes, int], ...] = tuple({} for _ in range(_N_SHARDS))
        self.live = 0
        self._used = 0
        """Bits that are taken, live, or still on names."""
        self._retired = 0
        """Dead, and not part of the pass that runs."""
        self._sweeping = 0
        """Dead; the pass that runs takes them off."""
        self._shard, self._todo = 0, list[bytes]()
        self._known: dict[int, int] = {}
        """One object per mask: a million names have few different ones."""

    def take(self) -> int:
        """A bit that no name carries. It does not show before `show`."""
        bit = ~self._used & (self._used + 1)
        self._used |= bit
        return bit

    def show(self, bits: int) -> None:
        """From now on these count."""
        self.live |= bits

    def retire(self, bits: int) -> None:
        """From now on these do not count; O(1)."""
        self.live &= ~bits
        self._retired |= bits

    def free(self, bits: int) -> None:
        """Bits that no name here carries may be taken again."""
        self._used &= ~bits
        self.live &= ~bits

    def add(self, names: Iterable[bytes], bits: int) -> None:
        """Put bits on names."""
        shards, known = self.shards, self._known
        for name in names:
            shard = shards[name[0]]
            mask = shard.get(name, 0) | bits
            shard[name] = known.setdefault(mask, mask)

    def remove(self, names: Iterable[bytes], bits: int) -> None:
        """Take bits off names; a name without bits is gone."""
        shards, known = self.shards, self._known
        for name in names:
            shard = shards[name[0]]
            mask = shard.get(name, 0) & ~bits
            if mask:
                shard[name] = known.setdefault(mask, mask)
            else:
                shard.pop(name, None)

    def __len__(self) -> int:
        """Names, those with nothing but dead bits included."""
        return sum(map(len, self.shards))

    @property
    def dead(self) -> int:
        """Bits that names may still carry although nobody counts them."""
        return self._retired | self._sweeping

    def sweep(self, limit: int) -> int:
        """Look at up to `limit` names and take dead bits off; returns the names looked at, 0 when nothing is dead.

        Bits that die during a pass over the names wait for the next pass.
        """
        seen = 0
        while seen < limit and self.dead:
            if not self._sweeping:
                self._sweeping, self._retired = self._retired, 0
                self._shard, self._todo = 0, list(self.shards[0])
            part = self._todo[seen - limit :]
            del self._todo[seen - limit :]
            self._clean(self.shards[self._shard], part)
            seen += len(part)
            if not self._todo:
                self._next_shard()
        return seen

    def _clean(self, shard: dict[bytes, int], names: Sequence[bytes]) -> None:
        dead, known = self._sweeping, self._known
        for name in names:
            mask = shard.get(name, 0)
            if mask & dead:
                mask &= ~dead
                if mask:
                    shard[name] = known.setdefault(mask, mask)
                else:
                    del shard[name]

    def _next_shard(self) -> None:
        self._shard += 1
        if self._shard < _N_SHARDS:
            self._todo = list(self.shards[self._shard])
            return
        self.free(self._sweeping)
        self._sweeping = 0
        self._known.clear()  # masks with dead bits would stay for ever

    def check(self) -> None:
        """Every bit on a name is in use; live and dead bits are apart. Raises AssertionError."""
        carried = 0
        for shard in self.shards:
            for mask in shard.values():
                carried |= mask
        assert not carried & ~self._used, (bin(carried), bin(self._used))
        assert not self.live & self.dead, (bin(self.live), bin(self.dead))
        assert not (self.live | self.dead) & ~self._used, (bin(self.live), bin(self.dead), bin(self._used))
