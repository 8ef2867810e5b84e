"""What a KV store counts."""

_COUNTERS = (
    "hit_tokens_total{tier=host}",
    "hit_tokens_total{tier=disk}",
    "missed_tokens_total",
    "stored_blocks_total",
    "refused_blocks_total",
    "disk_evicted_blocks_total",
    "load_failures_total",
    "corrupt_blocks_total",
    "kv_received_bytes_total",
    "kv_sent_bytes_total",
    "kv_bytes_total{direction=host_to_disk}",
    "kv_bytes_total{direction=disk_to_host}",
)


class Tally:
    """Owns the monotonic totals of one store. Bytes received and sent are those that travelled over tcp."""

    def __init__(self) -> None:
        self._totals = dict.fromkeys(_COUNTERS, 0.0)

    def add(self, counter: str, amount: float) -> None:
        """Raises KeyError for a counter that does not exist."""
        self._totals[counter] += amount

    @property
    def totals(self) -> dict[str, float]:
        """A copy, for reports."""
        return dict(self._totals)
