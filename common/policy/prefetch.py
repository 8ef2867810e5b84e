"""Is KV in another memory worth fetching, or is computing it anew as good? Pure; one rule for workers and the router.

Source: MemServe (arXiv 2406.17565), section 5.5: fetch a run of blocks if predicted time to fetch <= time to compute saved.
"""

from dataclasses import dataclass

from common.cost.link_cost import LinkCost
from common.cost.step_cost import StepCost

FETCH_POLICIES = ("auto", "always")
_BLIND_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Blocks that lie elsewhere and would go directly behind what is here of a prompt."""

    prompt_tokens: int
    cached_tokens: int
    """Here already."""
    n_blocks: int
    """That would be fetched."""
    block_tokens: int
    block_bytes: int

    @property
    def n_bytes(self) -> int:
        """To be fetched."""
        return self.n_blocks * self.block_bytes

    def saved_ms(self, cost: StepCost) -> float:
        """Time that needs no computing if the blocks come."""
        known = self.cached_tokens + self.n_blocks * self.block_tokens
        return cost.exec_ms(self.prompt_tokens, self.cached_tokens) - cost.exec_ms(self.prompt_tokens, known)


def fetch_pays(run: Run, link: LinkCost, cost: StepCost | None, *, waited: bool = False) -> bool:
    """Whether fetching takes no longer than computing what it saves. `waited`: the link's delay has passed already.

    Without a fitted cost nothing can be compared: then a run is fetched from two blocks on, since a fetch costs a round
    trip and computing costs by the block.
    """
    if run.n_blocks <= 0:
        return False
    if cost is None or cost.n_samples == 0:
        return run.n_blocks >= _BLIND_BLOCKS
    return link.fetch_ms(run.n_bytes) - (link.delay_ms if waited else 0.0) <= run.saved_ms(cost)
