"""Where a server tells of itself: one page, and how to read it."""

from collections.abc import Mapping
from typing import Protocol

from loadgen.results.timeline import ServerSample


class Source(Protocol):
    """One kind of page. Pure: bytes in, data out; every method raises ValueError for a body that it cannot read."""

    @property
    def server(self) -> str:
        """Name of the kind of server, for people."""
        ...

    @property
    def path(self) -> str:
        """Of the page."""
        ...

    def sample(self, body: bytes, at_s: float) -> ServerSample:
        """The server at that moment of the run."""
        ...

    def held(self, body: bytes) -> dict[str, float]:
        """What the server holds for requests, by a readable name. Back to what it was, once they are over.

        What is kept for reuse is not held.
        """
        ...

    def document(self, body: bytes) -> Mapping[str, object] | None:
        """The page as it stands, for the result; None if it is not worth keeping."""
        ...
