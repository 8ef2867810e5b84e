"""The membership of a pure world as Redis keeps it: a record is there as long as its process renews it, and a while after."""

from common.messages.liveness import Member

LISTED_MS = 3_000.0


class Registry:
    """Owns the records, by name: a new life's record takes the place of the older one's."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[Member, float]] = {}
        self.blind_until_ms = 0.0
        """Before that, nobody can read it."""

    def renew(self, member: Member, now_ms: float) -> None:
        self._records[member.id] = member, now_ms + LISTED_MS

    def listed(self, now_ms: float) -> list[Member] | None:
        """Who is there, or was a moment ago; None if nobody can read it."""
        self._records = {name: (m, until) for name, (m, until) in self._records.items() if until > now_ms}
        return None if now_ms < self.blind_until_ms else [member for member, _ in self._records.values()]
