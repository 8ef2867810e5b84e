"""How an operator changes the page memory of a worker that serves.

gateway -> worker    Resize          have so much memory
worker -> gateway    ResizeAnswer    what was reached, once all that could be done at once is done
"""

from common.messages.base import Message


class Resize(Message, frozen=True, kw_only=True):
    """Grow or shrink the page memory; repeating it changes nothing."""

    call: int
    """Of this gateway; the answer repeats it."""
    device_memory_bytes: int


class ResizeAnswer(Message, frozen=True, kw_only=True):
    """The worker's page memory after a Resize. Less than asked for: `problem` says why."""

    call: int
    device_memory_bytes: int
    """What the pool takes now."""
    target_bytes: int
    """What it goes on to: below what it takes while pages that are to leave are in use."""
    pages: int
    """That requests may have now."""
    leaving_pages: int
    """In use still; their memory goes when they are released."""
    problem: str = ""
    """Readable; empty: as asked for."""
