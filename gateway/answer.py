"""One choice of an answer: tokens in, text out, up to where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.messages.requests import TokenDelta, TokenLogprob
from gateway.stop_strings import StopStrings
from gateway.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """What new tokens add to a choice."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None = None
    """stop or length; None: more will come."""
    stop_reason: str | int | None = None
    """The stop string or the client's stop token id that ended it."""


class Choice:
    """Grows by `push` until a piece has `finish`; after that nothing may be pushed.

    A stop string can end it while its worker still generates: then the caller cancels there.
    """

    __slots__ = ("_client_stop_ids", "_stops", "_text", "index", "n_tokens")

    def __init__(self, index: int, tokens: Tokens, stops: Sequence[str], client_stop_ids: Sequence[int]) -> None:
        self.index = index
        self.n_tokens = 0
        self._text = tokens.stream()
        self._stops = StopStrings(stops) if stops else None
        self._client_stop_ids = frozenset(client_stop_ids)

    def push(self, delta: TokenDelta) -> Piece:
        """The text of new tokens, less what may still become a stop string."""
        tokens, finish = delta.tokens, delta.finish
        ended_by = tokens[-1] if finish == "stop" and tokens else None
        spoken = tokens if ended_by is None else tokens[:-1]  # the token that ends an answer has no text
        if self._stops is None:
            text = self._text.push(spoken)
            if finish is not None:
                text += self._text.finish()
            return self._piece(delta, text, ended_by)
        return self._push_until_stop(self._stops, delta, spoken, ended_by)

    def _push_until_stop(
        self, stops: StopStrings, delta: TokenDelta, spoken: Sequence[int], ended_by: int | None
    ) -> Piece:
        text = ""
        for count, token in enumerate(spoken, start=1):
            found = stops.push(self._text.push((token,)))
            text += found.text
            if found.stop is not None:
                self.n_tokens += count
                return Piece(text, delta.tokens[:count], delta.logprobs[:count], "stop", found.stop)
        if delta.finish is not None:
            found = stops.push(self._text.finish())
            text += found.text
            if found.stop is not None:
                self.n_tokens += len(delta.tokens)
                return Piece(text, delta.tokens, delta.logprobs, "stop", found.stop)
            text += stops.finish()
        return self._piece(delta, text, ended_by)

    def _piece(self, delta: TokenDelta, text: str, ended_by: int | None) -> Piece:
        self.n_tokens += len(delta.tokens)
        reason = ended_by if ended_by in self._client_stop_ids else None
        return Piece(text, delta.tokens, delta.logprobs, delta.finish, reason)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces of one choice as one."""
    if len(pieces) == 1:
        return pieces[0]
    last = pieces[-1]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(one for piece in pieces for one in piece.logprobs),
        last.finish,
        last.stop_reason,
    )
