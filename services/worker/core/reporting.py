"""What a worker says of itself, and the totals it keeps. Pure."""

from dataclasses import dataclass

from common.messages.liveness import Member, QueueCounts, Report, TransportReport
from kvstore.index.ledger import Ledger
from services.worker.core.scheduler import Scheduler


@dataclass(slots=True)
class CopyTotals:
    """What was copied to decode workers since the start; owned by the PrefillCore."""

    copies: int = 0
    copied_bytes: int = 0
    copy_ms: float = 0.0
    """Time the copier spent, hidden behind computation or not."""
    handed_over: int = 0

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "kv_copies_total": float(self.copies),
            "kv_copied_bytes_total": float(self.copied_bytes),
            "kv_copy_ms_total": self.copy_ms,
            "handed_over_total": float(self.handed_over),
        }


class Reporter:
    """Composes the answer to a Ping from the parts that both roles have."""

    def __init__(self, mine: Member, ledger: Ledger, scheduler: Scheduler) -> None:
        self._mine, self._ledger, self._scheduler = mine, ledger, scheduler
        self.draining = False
        """True from the call to stop: gateways see it and send no more."""

    def report(
        self,
        sequence: int,
        queue: QueueCounts,
        counters: dict[str, float],
        transports: tuple[TransportReport, ...] = (),
    ) -> Report:
        """`queue` and `counters` are the role's own; the scheduler's are added to the counters."""
        scheduler = self._scheduler
        return Report(
            worker=self._mine.id,
            role=self._mine.role,
            incarnation=self._mine.incarnation,
            sequence=sequence,
            pages=self._ledger.counts(),
            queue=queue,
            transports=transports,
            engine_steps=scheduler.steps_total,
            counters={
                "computed_tokens_total": float(scheduler.computed_tokens_total),
                "preemptions_total": float(scheduler.preemptions_total),
                "steps_total": float(scheduler.steps_total),
                **counters,
            },
            draining=self.draining,
        )
