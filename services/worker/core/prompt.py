"""One prompt on its way through a prefill worker."""

from dataclasses import dataclass

from common.ids import PeerId, TransferId
from common.messages.actions import Send
from common.messages.handover import KvSpan
from common.messages.requests import Failed, Generate
from services.worker.core.sequence import Sequence


@dataclass(slots=True, eq=False)
class Prompt:
    """Mutable record, owned by the PrefillCore."""

    message: Generate
    gateway: PeerId
    arrived_ms: float
    deadline_ms: float
    transfer: TransferId | None = None
    decode: PeerId | None = None
    sequence: Sequence | None = None
    asked_ms: float = 0.0
    granted_ms: float | None = None
    computed_ms: float | None = None
    told: bool = False
    """The gateway knows the outcome, or has cancelled."""

    @property
    def phase(self) -> str:
        """Where it is, in the words of messages.requests.Failed."""
        if self.transfer is None:
            return "prefill_queue"
        if self.computed_ms is None:
            return "prefill"
        return "grant" if self.granted_ms is None else "transfer"

    def source_pages(self, span: KvSpan) -> tuple[int, ...]:
        """Our pages that hold a span of a prompt that was started."""
        assert self.sequence is not None, "a prompt that was never started has no pages"
        row = self.sequence.table.ids[span.layer, span.first_block : span.first_block + span.n_blocks]
        return tuple(row.tolist())

    def tell(self, code: str, text: str, *, phase: str | None = None, retryable: bool = False) -> list[Send]:
        """Failed for the gateway, unless it knows already. `phase` None: where the prompt is now."""
        if self.told:
            return []
        self.told = True
        failed = Failed(
            request=self.message.request,
            code=code,
            phase=phase or self.phase,
            text=text,
            retryable=retryable,
            transfer=self.transfer,
        )
        return [Send(self.gateway, failed)]
