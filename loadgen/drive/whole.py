"""The sink of an answer that is wanted whole."""

import asyncio
from collections.abc import Mapping


class WholeAnswer:
    """Collects one response; `done` resolves with (status, body), or fails with ConnectionError."""

    def __init__(self, done: "asyncio.Future[tuple[int, bytes]]") -> None:
        self.done, self._status, self._pieces = done, 0, list[bytes]()

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers."""
        self._status = status

    def on_body(self, piece: bytes, at_s: float) -> None:
        """A piece of the body."""
        self._pieces.append(piece)

    def on_end(self) -> None:
        """The body is complete."""
        if not self.done.done():
            self.done.set_result((self._status, b"".join(self._pieces)))

    def on_lost(self, reason: str) -> None:
        """The connection broke."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))

    def on_broken(self, reason: str) -> None:
        """What came is not an HTTP answer."""
        self.on_lost(reason)
