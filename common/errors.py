"""Every error this system raises on purpose.

ServingError
├── Rejected              the caller asked for something we will never do     4xx, do not retry
│   ├── InvalidRequest    malformed or out of range                           400
│   ├── ContextTooLong    prompt + output exceed the model's context          400
│   ├── UnknownModel      no worker serves that model                         404
│   ├── UnknownWorker     no worker has that name                             404
│   └── BodyTooLarge      the HTTP body exceeds the limit                     413
├── Busy                  we would, but not now                               503, retry later
│   ├── OutOfPages        the page pool has not that many free pages
│   ├── OutOfChunks       the chunk pool's budget is spent
│   ├── NoWorker          no worker of the needed role is ready
│   └── RateLimited       this caller has used up what it may                 429
├── PeerFailed            another process broke its promise                   502, retry elsewhere
│   ├── LoadFailed        KV that was to be reused could not be fetched
│   ├── KvCorrupt         a page is not what its checksum says
│   ├── Stuck             nothing moved although there was work; a watchdog ended it
│   └── ProtocolViolation a message that the protocol does not allow
├── DeadlineExceeded      the request's own time is up                        504
└── ConfigError           the operator must change a setting                  exit code 2

Anything else that escapes is a bug in this repository: log it with its
traceback, let the process die, let its supervisor restart it.
"""

from typing import Self

EXIT_SUCCEEDED = 3
"""Exit code of a process whose name a newer life has taken: whoever keeps it alive must not start it again under that name."""


class ServingError(Exception):
    """Base. `code` is stable API; the text is for people and may change."""

    code = "internal"
    http_status = 500
    retryable = False
    phase: str | None = None
    """Of a request: where it ended. Set on instances, by who knows it."""
    attempts: int | None = None
    """Of a request: how often it was sent to workers. Set as `phase` is."""

    def in_phase(self, phase: str) -> Self:
        """This error, with the phase of the request that it ended; one that is known already stays."""
        self.phase = self.phase or phase
        return self


class Rejected(ServingError):
    """The caller asked for something we will never do."""

    code, http_status = "rejected", 400
    param: str | None = None
    """The field of the request that it is about, where there is one to name."""


class InvalidRequest(Rejected):
    """A malformed or out-of-range field."""

    code = "invalid_request"

    def __init__(self, text: str, *, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param


class ContextTooLong(Rejected):
    """The prompt plus the requested output does not fit the model's context."""

    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, output_tokens: int, limit_tokens: int, param: str | None = None) -> None:
        super().__init__(
            f"prompt is {prompt_tokens} tokens and max_tokens is {output_tokens}; "
            f"together they exceed the model's {limit_tokens}"
        )
        self.limit_tokens, self.param = limit_tokens, param


class UnknownModel(Rejected):
    """The request names a model that is not served here."""

    code, http_status = "model_not_found", 404


class UnknownWorker(Rejected):
    """An operator named a worker that is not here."""

    code, http_status = "worker_not_found", 404


class BodyTooLarge(Rejected):
    """The HTTP body exceeds the configured limit."""

    code, http_status = "body_too_large", 413


class Busy(ServingError):
    """We would, but not now. `retry_after_s`: when another try may succeed; None: nobody knows."""

    code, http_status, retryable = "busy", 503, True

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class OutOfPages(Busy):
    """The page pool cannot give that many pages. Nothing was allocated."""

    code = "out_of_pages"


class OutOfChunks(Busy):
    """The chunk pool's budget is spent. Nothing was allocated."""

    code = "out_of_chunks"


class NoWorker(Busy):
    """No worker of the needed role is ready."""

    code = "no_worker"


class RateLimited(Busy):
    """This caller has used up what it may."""

    code, http_status = "rate_limit_exceeded", 429


class PeerFailed(ServingError):
    """Another process broke its promise."""

    code, http_status, retryable = "peer_failed", 502, True


class LoadFailed(PeerFailed):
    """KV that was to be reused could not be fetched, and the operator wants no recomputation."""

    code = "load_failed"


class KvCorrupt(PeerFailed):
    """A page that arrived is not what its checksum says (`--verify-kv`). Nobody has used it."""

    code = "kv_corrupt"


class Stuck(PeerFailed):
    """Nothing moved for too long although there was work, and a watchdog gave this request up."""

    code = "stuck"


class ProtocolViolation(PeerFailed):
    """A message that the protocol does not allow here."""

    code = "protocol_violation"


class DeadlineExceeded(ServingError):
    """The request's own time is up."""

    code, http_status = "deadline_exceeded", 504


class ConfigError(ServingError):
    """The operator must change a setting. The process exits with code 2."""

    code = "config"
