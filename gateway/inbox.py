"""News of one HTTP request on their way from the switchboard to the coroutine that answers it."""

import asyncio
from dataclasses import dataclass

from common.errors import ServingError
from common.messages.requests import TokenDelta
from gateway.core.actions import Begun, Routed


@dataclass(frozen=True, slots=True)
class Sent:
    """The prompt is in a worker's socket."""

    begun: Begun
    sent_ms: float


News = TokenDelta | ServingError | Routed | Sent


class ClientLeft(Exception):
    """The client closed its connection; nobody waits for the answer."""


class Inbox:
    """News of all prompts of one HTTP request, in order of arrival. One coroutine takes, the event loop's thread puts.

    What piles up while the taker is busy comes out in one go: that is how a slow client gets fewer, larger chunks.
    """

    __slots__ = ("_left", "_news", "_waiter")

    def __init__(self) -> None:
        self._news: list[tuple[int, News]] = []
        self._left = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, news: News) -> None:
        """News of the prompt with that index."""
        self._news.append((index, news))
        self._wake()

    def client_left(self) -> None:
        """Ends the taker's wait."""
        self._left = True
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[tuple[int, News]]:
        """Everything since the last call, at least one. Raises ClientLeft."""
        while not self._news and not self._left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._left:
            raise ClientLeft
        news, self._news = self._news, []
        return news
