"""In what pieces a prompt's KV goes to its decode worker. Pure: load in, granularity out.

Source: MemServe (arXiv 2406.17565), which finds by-layer best at low load and aggregated blocks best at high load.
"""

from enum import StrEnum

AUTO = "auto"
"""The setting that leaves the choice to the load."""


class Granularity(StrEnum):
    """What is copied at once, and when."""

    LAYER = "layer"
    """Each layer's blocks as soon as they are computed: copies hide behind the computation."""
    REQUEST = "request"
    """The same pieces, all after the prompt is computed."""
    AGGREGATED = "aggregated"
    """After the prompt is computed, all layers of a block as one contiguous piece: fewest copies."""


_BUSY_TRANSFERS = 4
_LATE_SHARE = 0.6
"""Share of late grants above which aggregated is the better bet (benchmarks/handover_modes, 0.5B shape, 4 to 16 at once).

A copy hides behind the computation only if the grant comes before it: then by layer exposes least at any load. If the
grant comes after it, nothing hides, and aggregated exposes least.
"""


def choose(setting: str, open_transfers: int, waiting: int) -> Granularity:
    """Granularity of a new transfer. `setting`: a Granularity or `auto`; else ValueError.

    `open_transfers`: hand-overs that were begun and not committed, and prompts held back behind them; `waiting`: how many
    of these have no grant yet.
    """
    if setting != AUTO:
        return Granularity(setting)
    late = open_transfers >= _BUSY_TRANSFERS and waiting >= _LATE_SHARE * open_transfers
    return Granularity.AGGREGATED if late else Granularity.LAYER
