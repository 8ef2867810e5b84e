"""Who serves a request, and what was predicted of it."""

from dataclasses import dataclass

from common.ids import PeerId, WorkerId
from common.messages.requests import FetchHint
from common.policy.routing import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Who serves a request, and what was predicted of it."""

    route: Route
    entry: PeerId
    decode: PeerId
    entry_name: str
    decode_name: str
    fetch: FetchHint | None
    work_ms: float
    """Predicted time on the entry worker: what comes behind waits for its fetches too."""
    predicted_ms: float
    """Until its first token."""
    hit_tokens: int
    """Predicted to be cached on the entry worker, or fetched."""
    degraded: bool
    """The prompt tree was not in sync."""

    @property
    def entry_worker(self) -> WorkerId:
        """The entry's name."""
        return self.route.entry

    @property
    def decode_worker(self) -> WorkerId:
        """The decode worker's name."""
        return self.route.decode or self.route.entry
