"""A trace as a workload: what was not recorded is made up, equal where the trace says that it was equal. Pure."""

from dataclasses import dataclass

from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.content import ContentSource
from loadgen.workload.plan import Content, Conversation, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One conversation for each session of the trace, in its order, with its times.

    A hash id becomes a block of tokens that follows from the seed and the id, so equal ids are equal blocks; the last block
    is trimmed to the length of the prompt. Blocks that no id names, and requests without ids, share nothing.
    """

    trace: Trace
    source: ContentSource
    seed: int | str

    @property
    def n_conversations(self) -> int:
        """As many as the trace has sessions."""
        return len(self.trace.sessions)

    def conversation(self, index: int) -> Conversation:
        """The session at that place. Raises IndexError beyond the last."""
        if not 0 <= index < self.n_conversations:
            raise IndexError(f"the trace has {self.n_conversations} sessions, none at {index}")
        session = self.trace.sessions[index]
        return Conversation(
            index=index,
            turns=tuple(self._turn(session, index, place) for place in range(len(session.requests))),
            opening=session.opening,
            session=session.name,
        )

    def _turn(self, session: Session, index: int, place: int) -> Turn:
        request = session.requests[place]
        return Turn(
            added=self._content(request, f"{self.seed}/request/{index}/{place}", _kind(session)),
            output_tokens=request.output_tokens,
            think_s=request.think_s if place else 0.0,
            at_s=request.at_s,
            cancel_after_tokens=request.cancel_after_tokens,
        )

    def _content(self, request: TraceRequest, name: str, kind: str | None) -> Content:
        if request.content is not None:
            return request.content
        source = self.source if kind is None else ContentSource(kind=kind)
        pieces: list[Content] = []
        missing_tokens = request.added_tokens
        for hash_id in request.hash_ids:
            n_tokens = min(self.trace.block_tokens, missing_tokens)
            if n_tokens > 0:
                pieces.append(source.draw(f"{self.seed}/block/{hash_id}", n_tokens))
                missing_tokens -= n_tokens
        if missing_tokens:
            pieces.append(source.draw(name, missing_tokens))
        return _joined(pieces)


def _kind(session: Session) -> str | None:
    """What made-up turns of a session must be, where others of it are recorded; None: free."""
    recorded: list[Content | None] = [session.opening or None, *(request.content for request in session.requests)]
    known = next((content for content in recorded if content is not None), None)
    return None if known is None else "words" if isinstance(known, str) else "ids"


def _joined(pieces: list[Content]) -> Content:
    if all(isinstance(piece, str) for piece in pieces):
        return " ".join(piece for piece in pieces if isinstance(piece, str))
    return tuple(token for piece in pieces if not isinstance(piece, str) for token in piece)
