"""Who is inside of memory that may be unmapped, and who has to wait for whom."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import PeerFailed


class Uses:
    """Counts the uses in progress. They run side by side; closing, and changing what is mapped, wait for all of them.

    Any thread may call. A use must not begin another one inside: a change that waits for it would hold that one up.
    """

    def __init__(self, what: str) -> None:
        """`what`: the memory, for error texts."""
        self._what = what
        self._changed = threading.Condition()  # guards what follows
        self._users = 0
        self._changing = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called: uses in progress may still end, new ones are refused."""
        return self._closed

    @contextmanager
    def inside(self) -> Iterator[None]:
        """One use; waits for a change in progress. Raises PeerFailed once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._changing)
            self._require_open()
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A change, after the uses in progress; new ones wait until it is over. Raises PeerFailed once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._changing)
            self._require_open()
            self._changing = True
            self._changed.wait_for(lambda: self._users == 0)
        try:
            yield
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and return when nobody is inside."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._users == 0 and not self._changing)

    def _require_open(self) -> None:
        if self._closed:
            raise PeerFailed(f"{self._what} is not mapped any more")
