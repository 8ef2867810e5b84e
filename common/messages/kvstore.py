"""Messages between a worker and a KV store.

client -> store   Put      one payload frame per block follows; answered by Stored
client -> store   Fetch    answered by Fetched, one payload frame per hit, in the order of `blocks`
client -> store   Forget   drop these blocks; answered by Stored with the count

Blocks are named by content (16-byte chained hash, salted by the model), so a repeated or late message is harmless.
"""

from common.messages.base import Message


class Put(Message, frozen=True, kw_only=True):
    """Keep these blocks: all layers of a token block, identified by its chained hash."""

    call: int
    blocks: tuple[bytes, ...]


class Stored(Message, frozen=True, kw_only=True):
    """How many of the blocks of `call` the store holds now (Put) or dropped (Forget)."""

    call: int
    n_blocks: int
    text: str = ""
    """Why a Put was refused; empty if it was not."""


class Fetch(Message, frozen=True, kw_only=True):
    """Give me the leading run of these blocks that you hold."""

    call: int
    blocks: tuple[bytes, ...]


class Fetched(Message, frozen=True, kw_only=True):
    """The leading run that was found; each block's bytes follow as a payload frame."""

    call: int
    hits: int
    more: bool = False
    """The run goes on, but one answer would become too large: ask again from the first block that is missing."""


class Forget(Message, frozen=True, kw_only=True):
    """Drop these blocks."""

    call: int
    blocks: tuple[bytes, ...]
