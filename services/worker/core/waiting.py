"""What a prompt in any worker's queue looks like to those who prepare its start."""

from typing import Protocol

from common.block_hash import BlockHash
from common.messages.requests import Generate
from services.worker.core.sequence import Sequence


class WaitingPrompt(Protocol):
    """A prompt that has not started."""

    tokens: tuple[int, ...]
    """To compute: the prompt, and behind it what an earlier worker emitted."""
    names: list[BlockHash]
    """Of the blocks that may be reused."""
    looked_up: bool
    """Others were asked for its blocks, or need not be."""
    leader: Sequence | None
    """Who computes blocks that it waits for."""
    shared_blocks: int
    """Leading blocks that it waits for, or last waited for."""

    @property
    def message(self) -> Generate:
        """The request."""
        ...
