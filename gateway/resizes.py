"""Orders to change a worker's memory that wait for the worker's answer. Owned by the event loop's thread."""

import asyncio
import itertools

from common.errors import PeerFailed
from common.ids import PeerId
from common.messages.resizing import ResizeAnswer


class Resizes:
    """One entry per order, from `begin` until it is answered, its worker is lost, or nobody waits any more."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)
        self._open: dict[int, tuple[PeerId, asyncio.Future[ResizeAnswer]]] = {}

    def begin(self, peer: PeerId) -> tuple[int, asyncio.Future[ResizeAnswer]]:
        """A number for the order, and what will hold the answer, or PeerFailed."""
        call, future = next(self._calls), asyncio.get_running_loop().create_future()
        self._open[call] = peer, future
        future.add_done_callback(lambda _: self._open.pop(call, None))
        return call, future

    def answered(self, peer: PeerId, answer: ResizeAnswer) -> None:
        """A worker answered; what nobody waits for is ignored."""
        asked, future = self._open.get(answer.call, (None, None))
        if asked == peer and future is not None and not future.done():
            future.set_result(answer)

    def lost(self, peer: PeerId) -> None:
        """The worker cannot be reached, or not any more."""
        for asked, future in list(self._open.values()):
            if asked == peer and not future.done():
                future.set_exception(PeerFailed(f"{peer} was lost before it answered; its memory may have changed"))
