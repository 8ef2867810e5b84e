"""What a prompt in any worker's queue looks like to those who prepare its start."""

from typing import Protocol

from common.block_hash import BlockHash
from common.messages.requests import Generate


class WaitingPrompt(Protocol):
    """A prompt that has not started."""

    tokens: tuple[int, ...]
    """To compute: the prompt, and behind it what an earlier worker emitted."""
    names: list[BlockHash]
    """Of the blocks that may be reused."""
    looked_up: bool
    """Others were asked for its blocks, or need not be."""

    @property
    def message(self) -> Generate:
        """The request."""
        ...
