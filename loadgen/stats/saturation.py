"""Did work pile up during the run? Past saturation latencies measure the length of the run, not the server. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """Verdict on one open-loop run."""

    detected: bool
    why: str
    """One sentence with the numbers."""
