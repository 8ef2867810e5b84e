"""What happens to an order that failed half way: it is undone, or the process ends."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import OutOfChunks
from kvstore.memory.backend import HalfMoved, VmBackend


@contextmanager
def undo(backend: VmBackend) -> Iterator[None]:
    """Around calls that undo what was done of an order before it failed. They have what the back end keeps for that.

    Raises HalfMoved in place of OutOfChunks: who asked for the order would take that for "nothing has moved".
    """
    try:
        with backend.undoing():
            yield
    except OutOfChunks as error:
        raise HalfMoved(
            f"a move of chunks failed and could not be undone, so memory that is in use may lie nowhere: {error}"
        ) from error
