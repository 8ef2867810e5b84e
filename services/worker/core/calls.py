"""Numbers for the exchanges that this worker begins."""

from itertools import count


class Calls:
    """One counter for all that ask: an answer's number says whose it is."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def next(self) -> int:
        """A number never used before."""
        return next(self._numbers)
