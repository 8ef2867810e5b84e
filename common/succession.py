"""Whether a newer life has taken the name of this worker or KV store. Pure.

A process that was stopped for longer than its lease in the membership may find a successor there when it goes on. Two lives
under one name serve nobody well: others have hung up on the older one. So it finishes what is here, leases that it has
granted included, and ends. A record may also be that of a life that has just died; so only one that stays counts.
"""

from collections.abc import Sequence

from common.ids import PeerId, peer_id
from common.messages.liveness import Member

STAYS_MS = 4_000.0
"""Longer than the lease of a record that nobody renews (common.net.redis.LEASE_MS)."""


class Succession:
    """Owns since when which newer life is listed under this process's name."""

    def __init__(self, mine: Member) -> None:
        self._mine = mine
        self._since_ms: float | None = None
        self.successor: PeerId | None = None
        """Who has taken the name for good."""

    def on_members(self, members: Sequence[Member], now_ms: float) -> bool:
        """The membership was read. True, once: this life is over."""
        newer = [m for m in members if m.id == self._mine.id and m.is_newer_than(self._mine)]
        if self.successor is not None or not newer:
            self._since_ms = None
            return False
        if self._since_ms is None:
            self._since_ms = now_ms
        if now_ms - self._since_ms < STAYS_MS:
            return False
        self.successor = peer_id(newer[0].id, newer[0].incarnation)
        return True

    @property
    def over(self) -> bool:
        """Whether somebody has."""
        return self.successor is not None
