"""How far requests and transfers are in each core, in words: what a trace tells of the inside."""

from collections.abc import Callable, Sequence

from common.ids import PeerId
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


class StateNotes:
    """Owns what each process was last seen in; `say(who, whom, what, names)` is told of what changes."""

    def __init__(self, say: Callable[[str, str, str, Sequence[str]], None]) -> None:
        self._say = say
        self._states: dict[PeerId, dict[str, str]] = {}

    def note(self, peer: PeerId, core: PrefillCore | DecodeCore | Dispatch) -> None:
        now, before = states_of(core), self._states.setdefault(peer, {})
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                self._say(peer, "", f"    {name} {now.get(name, 'is over here')}", (name,))
                if name in now:
                    before[name] = now[name]
                else:
                    del before[name]

    def forget(self, peer: PeerId) -> None:
        self._states.pop(peer, None)
