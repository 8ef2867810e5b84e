"""What moving bytes between two processes costs, as measured by the one that moves them."""

import msgspec


class LinkCost(msgspec.Struct, frozen=True, array_like=True):
    """Travels in reports. One source of KV as seen by the worker that reads from it."""

    peer: str
    """PeerId of the source: a KV store or another worker."""
    tier: str
    """Where the blocks lay: `device`, `host` or `disk`."""
    bytes_per_s: float
    """Achieved lately; above 0."""
    delay_ms: float
    """From asking to the first byte, lately."""
    queued_bytes: int = 0
    """Asked for and not here yet."""

    def fetch_ms(self, n_bytes: int) -> float:
        """Time until `n_bytes` asked for now would be here: they wait for what is queued."""
        return self.delay_ms + (self.queued_bytes + n_bytes) / self.bytes_per_s * 1e3
