"""When memory that nobody uses goes back to the system, and when it is fetched. Pure.

Two marks with a gap between them and a time that the upper one must be passed for, so that a load that comes and goes moves
nothing. Source: vTensor (arXiv 2407.15309), elastic shrink and grow beside the decode path; giving half of what is free at a
time follows SGLang's elastic memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SpareMarks:
    """Chunks that may lie free. The low mark is below the high one."""

    low_chunks: int
    high_chunks: int
    hold_ms: float
    """How long more than the high mark must have been free."""

    @classmethod
    def of(cls, total_chunks: int, hold_ms: float = 2_000.0) -> "SpareMarks":
        """For a pool: an eighth is kept ready, and nothing moves before a quarter is free."""
        low = max(1, total_chunks // 8)
        return cls(low_chunks=low, high_chunks=max(low + 1, total_chunks // 4), hold_ms=hold_ms)


class SpareRule:
    """Owns since when much has been free."""

    def __init__(self, marks: SpareMarks) -> None:
        self.marks = marks
        """To be replaced when the pool has another size."""
        self._since_ms: float | None = None

    def change(self, free_chunks: int, away_chunks: int, now_ms: float) -> int:
        """How many chunks to give to the system; below 0: to take back, of the `away_chunks` it has."""
        marks = self.marks
        if free_chunks < marks.low_chunks:
            self._since_ms = None
            middle = (marks.low_chunks + marks.high_chunks) // 2
            return -min(away_chunks, middle - free_chunks)
        if free_chunks <= marks.high_chunks:
            self._since_ms = None
            return 0
        if self._since_ms is None:
            self._since_ms = now_ms
        if now_ms - self._since_ms < marks.hold_ms:
            return 0
        self._since_ms = now_ms  # the next half waits as long
        return min(-(-free_chunks // 2), free_chunks - marks.low_chunks)
