"""One KV hand-over that comes to a decode worker, from its request for pages to its end."""

from dataclasses import dataclass, field

import msgspec

from common.ids import Owner, PeerId
from common.messages.actions import Send
from common.messages.handover import GrantRequest, HandOver
from common.messages.requests import Failed, Timings
from kvstore.handover.actions import GaveUp
from kvstore.index.block_pool import BlockPool
from kvstore.index.page_table import PageTable
from services.worker.core.generation import Arrival
from services.worker.core.watchdog import Wait


@dataclass(slots=True, eq=False)
class IncomingTransfer:
    """Mutable record, owned by Incoming."""

    arrival: Arrival
    sender: PeerId
    request: GrantRequest
    since_ms: float
    """When it came, was granted pages, or was quarantined: the last of these."""
    table: PageTable | None = None
    """None while it waits for pages."""
    cached_blocks: int = 0
    """Leading blocks of the table that were cached here: the sender need not send them."""
    handed_ms: float | None = None
    """When its HandOver was heard."""
    timings: Timings = field(default_factory=Timings)
    """As that said; without it nobody here knows where the time went."""
    told: bool = False
    """The gateway knows that this ends without an answer, or ended it itself."""
    quarantined: bool = False
    """It will never be delivered; its sender may still write to its pages."""

    @property
    def owner(self) -> Owner:
        """Under which name its pages are kept until it is delivered."""
        return Owner(f"transfer/{self.request.transfer}")

    def note_pages(self, table: PageTable, cached_blocks: int, now_ms: float) -> None:
        """It waits for pages no more."""
        self.table, self.cached_blocks, self.since_ms = table, cached_blocks, now_ms

    def note_quarantined(self, now_ms: float) -> None:
        """It was stopped, and its sender has not said yet that it writes no more."""
        self.quarantined, self.since_ms = True, now_ms

    def note_handed(self, handover: HandOver, now_ms: float) -> None:
        """Its HandOver is here, maybe again, and maybe before its last pages."""
        if self.handed_ms is None:
            self.handed_ms, self.timings = now_ms, handover.timings

    def timings_at(self, now_ms: float) -> Timings | None:
        """Where its time has gone; None before its HandOver."""
        if self.handed_ms is None:
            return None
        transfer_ms = self.timings.transfer_ms + now_ms - self.handed_ms
        return msgspec.structs.replace(self.timings, transfer_ms=transfer_ms)

    def tell(self, gave_up: GaveUp, now_ms: float | None = None) -> list[Send]:
        """Failed for the gateway, unless it knows already. `now_ms`: tell the time that it took, too."""
        if self.told:
            return []
        self.told = True
        failed = Failed(
            request=self.arrival.request,
            code=gave_up.code,
            phase=gave_up.phase,
            text=gave_up.text,
            retryable=gave_up.retryable,
            transfer=gave_up.transfer,
            timings=None if now_ms is None else self.timings_at(now_ms),
        )
        return [Send(self.arrival.gateway, failed)]

    def wait(self, pool: BlockPool, until_ms: float | None, now_ms: float) -> Wait:
        """What it waits for. `until_ms`: for how long it is right to wait for its sender's word."""
        granted = self.table is not None
        held_by = f"{self.sender} to say that it writes no more" if self.quarantined else f"KV of {self.sender}"
        return Wait(
            request=self.request.request,
            phase="transfer" if granted else "grant",
            age_ms=now_ms - self.since_ms,
            pages=int(pool.ledger.page_ids(self.owner).size),
            waits_for=held_by if granted else "pages",
            until_ms=until_ms if granted else None,
            queued=not granted,
            over=self.told,
            theirs=self.quarantined,
            progress=until_ms,  # a lease that is renewed
        )

    def check(self, pool: BlockPool) -> None:
        """It owns the pages that it was granted. Raises RuntimeError."""
        table = self.table
        wanted = 0 if table is None else table.ids.size - self.cached_blocks * table.layers
        held = len(pool.pages_of(self.owner))
        if held != wanted:
            raise RuntimeError(f"transfer {self.request.transfer} holds {held} pages, not those of its table")
