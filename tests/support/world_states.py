"""How far requests and transfers are in each core, in words: what a trace tells of the inside."""

from gateway.core.dispatch import Dispatch
from services.worker.core.decode import DecodeCore
from services.worker.core.prefill import PrefillCore


def states_of(core: PrefillCore | DecodeCore | Dispatch) -> dict[str, str]:
    """Request or transfer -> its state; what has ended is not there."""
    match core:
        case Dispatch():
            inflight = core._inflight
            return {one.request: _attempt(one) for one in inflight._open.values()}
        case PrefillCore():
            sender = core._sender._open.items()
            sends: dict[str, str] = {t: f"sends: {o.state.value}, {o.in_flight} copies in flight" for t, o in sender}
            queued: dict[str, str] = {p.message.request: "waits for pages or a decode worker" for p in core._queue}
            return queued | sends
        case DecodeCore():
            incoming, receiver = core._incoming, core._incoming._receiver
            found: dict[str, str] = {t: f"receives: {one.state.value}" for t, one in receiver._open.items()}
            for transfer, one in incoming._transfers.items():
                if one.quarantined:
                    found[transfer] += ", pages quarantined"
            found |= dict.fromkeys(core._generation._answers, "draws its answer")
            return found | dict.fromkeys(core._local._waiting, "waits for room")


def _attempt(one: object) -> str:
    attempt = one.attempt  # type: ignore[attr-defined]  # an OpenRequest
    if attempt is None:
        return "pauses before its next attempt"
    return f"is with its workers as {attempt.wire}, in phase {attempt.phase}"
