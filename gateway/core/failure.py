"""Why an attempt ends without an answer; a worker's Failed message as an error of our own."""

from dataclasses import dataclass

from common.errors import ContextTooLong, OutOfPages, PeerFailed, ServingError
from common.ids import PeerId, WorkerId
from common.messages.requests import Failed


@dataclass(frozen=True, slots=True)
class Setback:
    """Why an attempt ends without an answer, and what follows for the next one."""

    error: ServingError
    avoid: frozenset[WorkerId] = frozenset()
    """Who should not try it again."""
    by: PeerId | None = None
    """The worker that gave it up by itself, or cannot hear: no Cancel for it."""
    died: bool = False
    """Whether that worker is dead."""


class WorkerFailed(ServingError):
    """A worker answered a request with Failed. Carries the worker's code, and the HTTP status that goes with it.

    A request that needs more pages than the worker has in all is too long (400), not unlucky: clients repeat a 503.
    """

    def __init__(self, failed: Failed, *, text: str) -> None:
        super().__init__(text)
        self.never_fits = failed.code == OutOfPages.code and not failed.retryable
        self.code = ContextTooLong.code if self.never_fits else failed.code
        self.http_status = http_status_of(self.code)
        self.retryable = failed.retryable
        self.phase = failed.phase
        self.timings = failed.timings


def http_status_of(code: str) -> int:
    """The status of the error class with that code; a code nobody knows is the worker's fault."""
    kinds: list[type[ServingError]] = [ServingError]
    while kinds:
        kind = kinds.pop()
        if kind.code == code:
            return kind.http_status
        kinds += kind.__subclasses__()
    return PeerFailed.http_status


_OWN_FAULTS = frozenset({"peer_failed", "protocol_violation", "load_failed", "stuck", "internal"})


def is_workers_fault(code: str) -> bool:
    """Whether it speaks against the worker: being full, draining or asked for the impossible does not."""
    return code in _OWN_FAULTS
