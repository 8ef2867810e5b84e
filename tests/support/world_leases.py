"""A law of leases: none ends that its writer could have renewed and has not, nor one whose renewal was heard in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.ids import PeerId, TransferId
from common.messages.base import Message
from common.messages.handover import Renew
from common.messages.requests import Failed
from kvstore.handover.states import SenderState
from services.worker.core.prefill import PrefillCore

if TYPE_CHECKING:
    from tests.support.world_faults import FaultyWorld

RENEWED_WITHIN_MS = 6_000.0
"""A writer renews every 5 s (kvstore.handover.sender)."""


class Leases:
    """Owns when the lease of each transfer was renewed last, as its writer said it, and as its receiver heard it."""

    def __init__(self, world: FaultyWorld) -> None:
        self._world = world
        self._said_ms: dict[TransferId, float] = {}
        self._heard_ms: dict[TransferId, float] = {}

    def note_said(self, source: PeerId, message: Message) -> None:
        """A message is sent. Raises AssertionError if it ends a lease that it should not."""
        if isinstance(message, Renew):
            self._said_ms |= dict.fromkeys(message.transfers, self._world.now_ms)
        if isinstance(message, Failed) and message.transfer is not None and "did not renew" in message.text:
            self._require_unrenewed(source, message.transfer)

    def note_heard(self, message: Message) -> None:
        if isinstance(message, Renew):
            self._heard_ms |= dict.fromkeys(message.transfers, self._world.now_ms)

    def _require_unrenewed(self, receiver: PeerId, transfer: TransferId) -> None:
        """A lease has ended. Whoever lives, runs and still writes has said Renew in its time, and it was lost on the way."""
        world = self._world
        heard_ms = world.now_ms - self._heard_ms.get(transfer, -RENEWED_WITHIN_MS)
        if heard_ms < RENEWED_WITHIN_MS:
            text = f"{receiver} ended the lease of {transfer}, and heard its renewal {heard_ms:.0f} ms ago"
            raise world.violation(text, (transfer,))
        sender = world.process(PeerId(transfer.partition("/")[0]))
        if sender is None or not world.kernel.runs(sender.peer) or not isinstance(sender.core, PrefillCore):
            return
        since_ms = max(self._said_ms.get(transfer, 0.0), world.kernel.standing[sender.peer].ran_since_ms)
        writes = sender.core._sender.state_of(transfer) in (SenderState.FILLING, SenderState.HANDING_OVER)
        if writes and world.now_ms - since_ms > RENEWED_WITHIN_MS:
            text = f"{receiver} ended the lease of {transfer}, which {sender.peer} fills and has not renewed"
            raise world.violation(text, (transfer,))
