"""Prompts that lack blocks which a running sequence is just computing wait for them, so that siblings share one computation.

Pure; owns a count. Who waits remembers whom it waits for. It waits until the blocks are there or that sequence computes
them no longer: it has ended, or gave its pages up. A running sequence never waits for one that has not started, so nobody
waits in a circle; a load that it waits for has its own end.
"""

from collections.abc import Sequence as Run

from common.block_hash import BlockHash
from kvstore.index.block_pool import BlockPool
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import Sequence
from services.worker.core.waiting import WaitingPrompt


class SharedPrefixes:
    """Knows which blocks are coming from what the scheduler's sequences have and have not published."""

    def __init__(self, pool: BlockPool, scheduler: Scheduler, block_tokens: int, *, keeps: bool) -> None:
        """`keeps`: whether finished blocks of prompts stay for others; if not, nobody waits."""
        self._pool, self._scheduler, self._block_tokens, self._keeps = pool, scheduler, block_tokens, keeps
        self.waits_total = 0
        """Prompts that have waited for a block being computed."""

    def holds(self, prompt: WaitingPrompt) -> bool:
        """Whether the prompt must wait. Asked at every event until it starts: cheap for one that still waits."""
        if not self._keeps:
            return False
        if prompt.leader is not None and _computes(prompt.leader, prompt.shared_blocks):
            return True
        first_time = prompt.shared_blocks == 0
        prompt.leader = self._find(prompt)
        self.waits_total += first_time and prompt.leader is not None
        return prompt.leader is not None

    def _find(self, prompt: WaitingPrompt) -> Sequence | None:
        """Who computes the first block that is missing, and most of those after it."""
        names, leader = prompt.names, None
        here = longest = self._pool.match(names)
        if here == len(names):
            return None
        for sequence in self._scheduler.prompts:
            if _computes(sequence, here + 1):
                common = _common(names, sequence.hashes[: sequence.known_tokens // self._block_tokens], here)
                if common > longest:
                    leader, longest = sequence, common
        if leader is not None:
            prompt.shared_blocks = longest
        return leader


def _computes(sequence: Sequence, n_blocks: int) -> bool:
    """Whether it has its pages and has yet to publish the last of its first `n_blocks` blocks."""
    publishes = not sequence.dropped and sequence.ring is None
    return publishes and sequence.table.n_blocks > 0 and sequence.published_blocks < n_blocks


def _common(names: Run[BlockHash], others: Run[BlockHash], here: int) -> int:
    """Length of the common start, which is known to be `here` or more. A name stands for all blocks before it, too."""
    low, high = here, min(len(names), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if names[middle - 1] == others[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
