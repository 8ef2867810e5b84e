"""Whether a newer life has taken the name of this worker or KV store.

A process that was stopped for longer than its lease in the membership may find a successor there when it goes on. Two lives
under one name serve nobody well: others have hung up on the older one. So it finishes what is here, leases that it has
granted included, and ends. A record may also be that of a life that has just died; so only one that stays counts, and of lives
that come and go one after another none does.
"""

from common.ids import PeerId

STAYS_MS = 4_000.0
"""Longer than the lease of a record that nobody renews (common.net.redis.LEASE_MS)."""


class Succession:
    """Owns since when a newer life is listed under this process's name."""

    def __init__(self) -> None:
        self._candidate: PeerId | None = None
        self._since_ms = 0.0
        """When the candidate was read for the first time, without a reading that lacks it since then."""
        self.successor: PeerId | None = None
        """Who has taken the name for good."""

    def on_newer(self, newer: PeerId | None, read_ms: float) -> bool:
        """The membership was read at `read_ms`, which may be a while ago: `newer` was listed under this name, or nobody.

        True, once: this life is over.
        """
        if self.over:
            return False
        if newer != self._candidate:
            self._candidate, self._since_ms = newer, read_ms
        if newer is None or read_ms - self._since_ms < STAYS_MS:
            return False
        self.successor = newer
        return True

    @property
    def over(self) -> bool:
        """Whether somebody has."""
        return self.successor is not None

    @property
    def refusal(self) -> str:
        """Why nothing new is taken; empty while it is."""
        return (
            f"{self.successor} has taken this name: what is under way ends, and then this life does"
            if self.over
            else ""
        )
