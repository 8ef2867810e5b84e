"""One request of the gateway from its arrival to its answer, and the attempt that serves it now."""

from dataclasses import dataclass, field

from common.errors import ServingError
from common.ids import PeerId, RequestId, WorkerId
from gateway.core.order import Order
from gateway.core.placed import Placed


@dataclass(slots=True)
class Attempt:
    """One sending of a request to workers. Mutable record, owned by Inflight."""

    wire: RequestId
    """Its name on the wire: workers remember cancelled ids, so every attempt has its own."""
    placed: Placed
    sent_ms: float
    prefilling: bool = True
    """Until its first token the entry worker is needed and charged."""
    left_entry: bool = False
    """The entry worker has said that it is not there any more."""
    news_ms: float = 0.0
    """When it was sent, its last token came, or it was last asked about."""
    unanswered: int = 0
    """Questions about it in a row that its knower answered nothing to, and of which no token came. Time would not do: a
    gateway that was stopped asked nothing."""

    def __post_init__(self) -> None:
        """Sent just now."""
        self.news_ms = self.sent_ms

    @property
    def knower(self) -> PeerId:
        """Who must know of it now, if no message was lost."""
        return self.entry if self.prefilling and not self.left_entry else self.decode

    @property
    def entry(self) -> PeerId:
        """Who computes the prompt."""
        return self.placed.entry

    @property
    def decode(self) -> PeerId:
        """Who sends the tokens; equals `entry` where one worker does both."""
        return self.placed.decode

    @property
    def needed(self) -> tuple[PeerId, ...]:
        """Workers whose death ends the attempt."""
        return (self.entry, self.decode) if self.prefilling else (self.decode,)

    @property
    def phase(self) -> str:
        """For error messages."""
        return "prefill" if self.prefilling else "decode"

    def worker_of(self, peer: PeerId) -> WorkerId:
        """The name of one of the two."""
        return self.placed.entry_worker if peer == self.entry else self.placed.decode_worker

    def name_of(self, peer: PeerId) -> str:
        """For people, such as `prefill worker prefill-0`."""
        return self.placed.entry_name if peer == self.entry else self.placed.decode_name


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """What became of an attempt that was not the last one."""

    code: str
    phase: str
    worker: WorkerId
    """Who failed it, or said that it failed."""
    ms: float
    """From its sending to its end."""


@dataclass(slots=True)
class OpenRequest:
    """Mutable record, owned by Inflight."""

    order: Order
    arrived_ms: float
    deadline_ms: float
    priority: int
    """Its own and its key's; lower goes first."""
    emitted: list[int] = field(default_factory=list)
    """Tokens that the client has."""
    attempt: Attempt | None = None
    """None while it waits for a place or for its next try."""
    tries: int = 0
    """Attempts since the last new token, and the one that it came from."""
    attempts_total: int = 0
    deaths: int = 0
    """Workers that died with it: one that kills whoever computes it must not go round."""
    avoid: frozenset[WorkerId] = frozenset()
    """Workers that have just failed it."""
    retry_at_ms: float | None = None
    failed_ms: float | None = None
    """When it lost its last attempt."""
    error: ServingError | None = None
    """Of its last attempt."""
    failed: tuple[FailedAttempt, ...] = ()
    """The latest of its attempts that failed and were followed by another."""

    @property
    def request(self) -> RequestId:
        """The client's name of it."""
        return self.order.request

    @property
    def phase(self) -> str:
        """Where it is: with workers, or between two attempts."""
        return self.attempt.phase if self.attempt is not None else "retry"

    @property
    def progress(self) -> str:
        """Where it stands, for error messages."""
        return self._done if self.attempt is None else self.at(self.attempt.phase)

    def at(self, phase: str) -> str:
        """A phase of its attempt, for error messages. A prompt that is computed again has tokens of an earlier attempt."""
        replayed = self.emitted and self.attempt is not None and self.attempt.prefilling
        return f"in phase {phase}{' of a replay' if replayed else ''} {self._done}"

    @property
    def _done(self) -> str:
        return f"after {len(self.emitted)} tokens" if self.emitted else "before the first token"
