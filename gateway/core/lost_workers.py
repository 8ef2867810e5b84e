"""Workers that were lost lately, for operators: who is gone leaves no row in any table. Pure.

Owns `_lost`: an entry comes with a loss and leaves when the worker is back, ten minutes later, or when there are too many.
"""

from collections.abc import Collection
from dataclasses import dataclass

from common.ids import WorkerId
from common.messages.liveness import Member

_REMEMBERED_MS = 600_000.0
_MOST = 64


@dataclass(frozen=True, slots=True)
class LostWorker:
    """A worker's last life here."""

    member: Member
    text: str
    """Continues the sentence 'worker x ...'."""
    lost_ms: float
    """When, on the gateway's clock."""


class LostWorkers:
    """Remembers; decides nothing."""

    def __init__(self) -> None:
        self._lost: dict[WorkerId, LostWorker] = {}

    def add(self, member: Member, text: str, now_ms: float) -> None:
        """It was lost now. Above the bound the eldest is forgotten."""
        self._lost.pop(member.id, None)
        while len(self._lost) >= _MOST:
            del self._lost[next(iter(self._lost))]
        self._lost[member.id] = LostWorker(member, text, now_ms)

    def missing(self, here: Collection[WorkerId], now_ms: float) -> list[LostWorker]:
        """Who is still gone, the eldest loss first. `here`: workers that answer; they are back."""
        for one in list(self._lost.values()):
            if one.member.id in here or now_ms - one.lost_ms > _REMEMBERED_MS:
                del self._lost[one.member.id]
        return list(self._lost.values())
