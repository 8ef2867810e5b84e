"""Whatever else the memory of KV pages serves: scratch of steps, or the system. One place to ask when pages are short. Pure but
for the port that moves chunks (`CarryOut`), which it passes on."""

from dataclasses import dataclass

from services.worker.core.actions import CarryOut
from services.worker.core.elastic import OwnScratch, StepScratch
from services.worker.core.spare_memory import SpareMemory


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """The borrowers; each owns its own state."""

    scratch: StepScratch
    spare: SpareMemory | None = None

    def inflate(self, n_pages: int) -> bool:
        """Make so many pages more available now; what only the system has is asked for, if it suffices, and comes later."""
        if self.scratch.inflate(n_pages):
            return True
        if self.spare is not None:
            self.spare.recall(n_pages - (self.scratch.spare_pages if self.spare.away_chunks else 0))
        return False

    @property
    def is_coming(self) -> bool:
        """Whether the system is giving memory back."""
        return self.spare is not None and self.spare.is_coming

    def on_tick(self, now_ms: float, *, may_lend: bool) -> None:
        """Time passed. Not `may_lend`: somebody waits for pages, or the pool is about to have another size."""
        if self.spare is not None:
            self.spare.on_tick(now_ms, may_lend=may_lend)

    def on_chunks_back(self, chunks: tuple[int, ...], problem: str) -> None:
        """The system gave memory back, or did not."""
        assert self.spare is not None, "nobody asked the system for memory"
        self.spare.on_chunks_back(chunks, problem)

    def carry_out_with(self, carry_out: CarryOut) -> None:
        """Whatever is lent or taken back moves by this from now on. Raises ConfigError if what lasts cannot be had."""
        self.scratch.carry_out_with(carry_out)
        if self.spare is not None:
            self.spare.carry_out_with(carry_out)

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return self.scratch.counters() | ({} if self.spare is None else self.spare.counters())


NOTHING_LENT = PoolMemory(OwnScratch())
"""Pages are all there is."""
