"""What a worker says of itself, and the totals it keeps. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from common.messages.liveness import Member, QueueCounts, Report
from services.worker.core.actions import Moved
from services.worker.core.overseer import Overseer
from services.worker.core.parts import Parts
from services.worker.core.waiting import WaitingPrompt


@dataclass(slots=True)
class CopyTotals:
    """What was copied to decode workers since the start; owned by the PrefillCore."""

    copies: dict[str, int] = field(default_factory=dict)
    """By granularity: runs of pages that were one piece on both sides."""
    copied_bytes: int = 0
    copy_ms: float = 0.0
    """Time the copier spent, hidden behind computation or not."""
    handed_over: int = 0

    def add(self, mode: str, moved: Moved) -> None:
        """A copy of a transfer of that granularity ended."""
        self.copies[mode] = self.copies.get(mode, 0) + moved.n_copies
        self.copied_bytes += moved.n_bytes if moved.ok else 0
        self.copy_ms += moved.elapsed_ms

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            **{f"kv_copies_total{{mode={mode}}}": float(copies) for mode, copies in self.copies.items()},
            "kv_bytes_total{direction=prefill_to_decode}": float(self.copied_bytes),
            "kv_copy_ms_total": self.copy_ms,
            "handed_over_total": float(self.handed_over),
        }


class Reporter:
    """Composes the answer to a Ping from the parts that both roles have."""

    def __init__(self, mine: Member, parts: Parts, overseer: Overseer) -> None:
        self._mine, self._parts, self._overseer = mine, parts, overseer
        self.noted: dict[str, float] = {}
        """Counters that the shell keeps."""
        self.noted_gauges: dict[str, float] = {}
        """Values that the shell knows."""
        self.draining = False
        """True from the call to stop: gateways see it and send no more."""

    def report(
        self,
        sequence: int,
        queue: QueueCounts,
        counters: dict[str, float],
        now_ms: float,
        queued: Iterable[WaitingPrompt],
    ) -> Report:
        """`queue` and `counters` are the role's own; those of the scheduler and the cache are added to the counters.

        `queued`: prompts that the scheduler does not have yet.
        """
        parts, scheduler = self._parts, self._parts.scheduler
        work_ms = parts.costing.work_ms(scheduler.prompts, queued)
        return Report(
            worker=self._mine.id,
            role=self._mine.role,
            incarnation=self._mine.incarnation,
            sequence=sequence,
            pages=parts.pool.ledger.counts(),
            recallable_pages=parts.pool.lent.recallable_pages,
            queue=msgspec.structs.replace(queue, work_ms=work_ms),
            transports=parts.neighbours.transports,
            engine_steps=scheduler.flight.begun_total,
            counters={
                "computed_tokens_total": float(scheduler.computed_tokens_total),
                "preemptions_total": float(scheduler.preemptions_total),
                "steps_total": float(scheduler.flight.begun_total),
                "engine_busy_ms_total": scheduler.computed_ms_total,
                "steps_planned_ahead_total": float(scheduler.flight.ahead_total),
                "shared_prefix_waits_total": float(parts.shared.waits_total),
                **parts.cache.counters(parts.reuse.totals),
                **parts.pool_memory.counters(),
                **self._overseer.counters(),
                **counters,
                **self.noted,
            },
            draining=self.draining,
            gauges={
                **parts.cache.gauges(now_ms),
                **parts.costing.gauges(),
                **parts.resizing.gauges(),
                **self._overseer.gauges(now_ms),
                **self.noted_gauges,
            },
            cost=parts.costing.cost,
            links=parts.cache.links(now_ms),
            memory=parts.memory.parts(),
            degraded=self._overseer.degraded(now_ms),
        )
