"""Blocks that will soon be cached because a prompt was just sent there: two generations of names, the older one thrown away.

An entry lives one to two periods. Nothing is ever looked for by age.
"""

from collections.abc import Sequence

_MOST_NAMES = (
    200_000  # of one generation: without a feed a period is long, and a table that grows larger stops the loop
)


class Expectations:
    """Owns the bits that names are expected to carry; `young` and `old` are there to be read."""

    def __init__(self) -> None:
        self.young: dict[bytes, int] = {}
        self.old: dict[bytes, int] = {}
        self._turned_ms: float | None = None
        self._retired, self._fading = 0, 0

    def add(self, names: Sequence[bytes], bit: int) -> None:
        """These will carry `bit`."""
        young = self.young
        for name in names:
            young[name] = young.get(name, 0) | bit

    def retire(self, bit: int) -> None:
        """Nobody adds this bit again; a later `turn` returns it."""
        self._retired |= bit

    def turn(self, now_ms: float, period_ms: float) -> int:
        """Forget the older generation if a period is over; returns retired bits that no name carries any more."""
        if self._turned_ms is None:
            self._turned_ms = now_ms
        if now_ms - self._turned_ms < period_ms and len(self.young) < _MOST_NAMES:
            return 0
        self._turned_ms = now_ms
        self.old, self.young = self.young, {}
        free, self._fading, self._retired = self._fading, self._retired, 0
        return free
