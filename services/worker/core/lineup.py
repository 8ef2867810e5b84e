"""Which sequences have pages, and which wait for them. Pure."""

from collections import deque

from common.messages.liveness import QueueCounts
from services.worker.core.sequence import Sequence


class Lineup:
    """Owns both lists, each by arrival. A sequence that is neither computes no further, but may have pages still."""

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        """To read."""
        self.running: list[Sequence] = []
        """To read."""

    def wait(self, sequence: Sequence) -> None:
        """It has no pages, or none any more."""
        self.halt(sequence)
        self.waiting.append(sequence)
        self.waiting = deque(sorted(self.waiting, key=_order))

    def run(self, sequence: Sequence) -> None:
        """It has its pages."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=_order)

    def halt(self, sequence: Sequence) -> None:
        """It computes no further."""
        if sequence in self.running:
            self.running.remove(sequence)

    def queue(self) -> QueueCounts:
        """Counts for reports."""
        pending = sum(one.uncomputed_tokens for one in self.prompts)
        held = sum(one.computed_tokens for one in self.running)
        return QueueCounts(waiting=len(self.waiting), running=len(self.running), waiting_tokens=pending, kv_tokens=held)

    @property
    def prompts(self) -> list[Sequence]:
        """Sequences that compute or will compute more than the next token; to read."""
        return [*self.waiting, *(one for one in self.running if one.uncomputed_tokens > 1)]


def _order(sequence: Sequence) -> int:
    return sequence.order
