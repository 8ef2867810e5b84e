"""Which sequences have pages, and which wait for them. Pure."""

from collections import deque

from common.messages.liveness import QueueCounts
from services.worker.core.sequence import Sequence

MOST_PASSES = 8


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

    def may_pass(self, order: int | None = None) -> bool:
        """Whether somebody new may take pages before those that wait (and came before `order`): all of them gave way for
        such, and no more than `MOST_PASSES` went before them since."""
        return all(one.passed is not None and one.passed < MOST_PASSES for one in self._before(order))

    def pass_by(self, order: int | None = None) -> None:
        """Somebody new takes pages before them."""
        for one in self._before(order):
            one.passed = 1 + (one.passed or 0)

    def _before(self, order: int | None) -> list[Sequence]:
        return [one for one in self.waiting if order is None or one.order < order]

    def queue(self, block_tokens: int) -> QueueCounts:
        """Counts for reports; what is fetched when its sequence starts need not be computed."""
        pending = sum(len(one.tokens) - one.coming_tokens(block_tokens) for one in self.prompts)
        held = sum(one.computed_tokens for one in self.running)
        return QueueCounts(waiting=len(self.waiting), running=len(self.running), waiting_tokens=pending, kv_tokens=held)

    @property
    def prompts(self) -> list[Sequence]:
        """Sequences that compute or will compute more than the next token; to read."""
        return [*self.waiting, *(one for one in self.running if one.uncomputed_tokens > 1)]


def _order(sequence: Sequence) -> int:
    return sequence.order
