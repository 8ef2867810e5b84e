"""Checks of block names that came from elsewhere."""

from collections.abc import Sequence

from common.block_hash import HASH_BYTES
from common.messages.blocks import BlockName

MAX_DEPTH_BLOCKS = 2**32
MAX_CALL_BLOCKS = 2**16
"""A million tokens in one call."""


def bad_names(blocks: Sequence[BlockName]) -> str:
    """What is wrong with the blocks of a Put or Reserve; empty if nothing is."""
    if len(blocks) > MAX_CALL_BLOCKS:
        return f"{len(blocks)} blocks in one call; {MAX_CALL_BLOCKS} are allowed"
    for block in blocks:
        if len(block.name) != HASH_BYTES or len(block.parent) != HASH_BYTES:
            return f"names of {len(block.name)} and {len(block.parent)} bytes; a block's name has {HASH_BYTES}"
        if not 0 <= block.depth < MAX_DEPTH_BLOCKS:
            return f"a block at depth {block.depth}; it must be 0 to {MAX_DEPTH_BLOCKS - 1}"
    return ""
