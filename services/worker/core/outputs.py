"""Tokens on their way to the gateways. Pure."""

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.requests import TokenDelta, Tokens
from services.worker.core.sequence import Sequence


def finish_of(sequence: Sequence) -> str | None:
    """Why the sequence ends with its last token: `stop`, `length`, or None if it goes on."""
    if sequence.tokens[-1] in sequence.sampling.stop_token_ids:
        return "stop"
    return "length" if len(sequence.tokens) >= sequence.limit_tokens else None


class Outbox:
    """Collects what one event gave each gateway, so that a step costs one message per gateway."""

    def __init__(self) -> None:
        self._deltas: dict[PeerId, list[TokenDelta]] = {}

    def add(self, gateway: PeerId, delta: TokenDelta) -> None:
        """Queue one request's tokens."""
        self._deltas.setdefault(gateway, []).append(delta)

    def flush(self) -> list[Send]:
        """All that was queued, one message per gateway."""
        sends = [Send(gateway, Tokens(deltas=tuple(deltas))) for gateway, deltas in self._deltas.items()]
        self._deltas.clear()
        return sends
