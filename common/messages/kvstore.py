"""Messages between a worker and a KV store.

client -> store   Put      one payload frame per block follows; answered by Stored
client -> store   Fetch    answered by Fetched, one payload frame per hit, in the order of `hits`
client -> store   Forget   drop these blocks if nobody reads them; answered by Stored with the count
"""

from common.messages.base import Message


class Put(Message, frozen=True, kw_only=True):
    """Keep these blocks: all layers of a token block, identified by its chained hash."""

    call: int
    blocks: tuple[bytes, ...]


class Stored(Message, frozen=True, kw_only=True):
    """How many of the blocks of `call` were taken (Put) or dropped (Forget)."""

    call: int
    n_blocks: int


class Fetch(Message, frozen=True, kw_only=True):
    """Give me the leading run of these blocks that you hold."""

    call: int
    blocks: tuple[bytes, ...]


class Fetched(Message, frozen=True, kw_only=True):
    """The leading run that was found; each block's bytes follow as a payload frame."""

    call: int
    hits: int


class Forget(Message, frozen=True, kw_only=True):
    """Drop these blocks."""

    call: int
    blocks: tuple[bytes, ...]
