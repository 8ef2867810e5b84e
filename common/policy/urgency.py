"""In which order those go who wait, in the gateway and on workers. Pure."""

PRIORITY_MS = 1_000.0
"""Waiting that one step of priority is worth."""


def rank_ms(arrived_ms: float, priority: int) -> float:
    """The lowest goes first: the earliest arrival, where each step of priority counts as so much later.

    So the urgent go first, and nobody waits for ever behind them. Times of one clock.
    """
    return arrived_ms + priority * PRIORITY_MS
