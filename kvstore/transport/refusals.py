"""What the system or the driver refuses to do for one connection is the failure of that connection, not of the process."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import PeerFailed, ServingError
from kvstore.memory.backend import VmMisuse

REFUSED = (OSError, ServingError, VmMisuse)
"""For example too many open files, no memory, or memory of a device that ours cannot reach."""


@contextmanager
def refusals(doing: str) -> Iterator[None]:
    """Raises PeerFailed for what is refused inside. `doing`: a verb for what was tried with a peer's memory."""
    try:
        yield
    except PeerFailed:
        raise
    except REFUSED as error:
        raise PeerFailed(f"cannot {doing} a peer's memory: {error}") from error
