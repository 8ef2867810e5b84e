"""Will there be blocks enough for the next step, and who should give way if not? Pure.

Source: LayerKV (arXiv 2410.00428): KV leaves before it must, instead of requests being computed again. Its order of victims is
not published; ours is said below.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def shortfall_blocks(available: int, released: int, required: int) -> int:
    """Blocks that must be freed now so that the next step does not lack any; 0: none.

    Free after it are `available` + `released` - `required`: free now, given back by then, and taken by then.
    """
    return max(0, required - available - released)


@dataclass(frozen=True, slots=True)
class Victim:
    """Who could give way."""

    slack_ms: float
    """`common.policy.admission.Drawing.slack_ms`."""
    n_blocks: int
    """That this would free."""
    order: int
    """Number of its arrival."""


def victims(candidates: Sequence[Victim]) -> list[int]:
    """Places of the candidates, in the order in which they give way: who can wait longest, then who frees most, then youngest."""
    keys = [(-one.slack_ms, -one.n_blocks, -one.order) for one in candidates]
    return sorted(range(len(candidates)), key=keys.__getitem__)
