"""Stop strings in a text that arrives in pieces: what may be shown, and when to stop.

The result does not depend on how the text was cut: it is what reading character by character gives. Of several stop
strings the one that is complete first wins; of those complete at the same character, the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """`text` may be shown; `stop` is the stop string that was reached, after which nothing counts."""

    text: str
    stop: str | None = None


class StopStrings:
    """One answer's text, held back only where it may still become a stop string.

    Each stop string is followed by the Knuth-Morris-Pratt automaton: its state is the length of its longest beginning
    that the text ends with. So a character costs a few steps, whatever the stop strings are.
    """

    __slots__ = ("_held", "_skips", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        self._stops = tuple(stops)
        self._skips = tuple(_skip_table(stop) for stop in stops)
        self._states = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> Found:
        """Add text; returns what is now certain to be no part of a stop string."""
        held = self._held + text
        for end in range(len(self._held) + 1, len(held) + 1):
            reached = self._advance(held[end - 1])
            if reached is not None:
                self._held = ""
                return Found(held[: end - len(reached)], reached)
        certain = len(held) - max(self._states)
        self._held = held[certain:]
        return Found(held[:certain])

    def _advance(self, character: str) -> str | None:
        reached: str | None = None
        for index, stop in enumerate(self._stops):
            state, skips = self._states[index], self._skips[index]
            while state and stop[state] != character:
                state = skips[state - 1]
            if stop[state] == character:
                state += 1
            self._states[index] = state
            if state == len(stop) and (reached is None or len(stop) > len(reached)):
                reached = stop
        return reached

    def finish(self) -> str:
        """The text is over: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _skip_table(stop: str) -> list[int]:
    """[i]: length of the longest proper beginning of stop[: i + 1] that is also its end."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
