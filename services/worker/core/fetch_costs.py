"""Whether other processes' blocks are worth fetching, by what computing and fetching have cost lately. Pure.

Owns the fits of the links that this worker reads from; what a step costs is told by whoever fits that.
"""

from collections.abc import Callable, Sequence

from common.cost.link_cost import LinkCost
from common.cost.link_fit import LinkFits
from common.cost.step_cost import StepCost
from common.ids import PeerId
from common.policy.prefetch import Run, fetch_pays
from services.worker.core.neighbours import BlockLink

_SLOWEST_FIRST = ("disk", "host", "device")


class FetchCosts:
    """Judges runs of blocks, and learns from every answer and every end of a load."""

    def __init__(self, step_cost: Callable[[], StepCost | None], block_tokens: int, *, always: bool = False) -> None:
        """`step_cost`: None while nothing is fitted. `always`: fetch whatever a worker without any fit would fetch."""
        self._step_cost, self._block_tokens, self._always = step_cost, block_tokens, always
        self._fits = LinkFits()

    def may_pay(self, link: BlockLink, prompt_tokens: int, blocks: range, now_ms: float) -> bool:
        """Whether asking is worth it, if all these blocks of a prompt lay where the link is best."""
        tier = "host" if link.is_store else "device"
        return self._judge(link, tier, prompt_tokens, blocks, waited=False, now_ms=now_ms)

    def pays(self, link: BlockLink, tier: str, prompt_tokens: int, blocks: range, now_ms: float) -> bool:
        """Whether blocks that were found are worth the copy; the answer was waited for already."""
        return self._judge(link, tier, prompt_tokens, blocks, waited=True, now_ms=now_ms)

    def _judge(
        self, link: BlockLink, tier: str, prompt_tokens: int, blocks: range, *, waited: bool, now_ms: float
    ) -> bool:
        run = Run(
            prompt_tokens=prompt_tokens,
            cached_tokens=blocks.start * self._block_tokens,
            n_blocks=len(blocks),
            block_tokens=self._block_tokens,
            block_bytes=link.block_bytes,
        )
        cost = None if self._always else self._step_cost()
        return fetch_pays(run, self._cost(link, tier, now_ms), cost, waited=waited)

    def _cost(self, link: BlockLink, tier: str, now_ms: float) -> LinkCost:
        return self._fits.cost(link.peer, tier, link.probed_bytes_per_s, now_ms)

    # -- what happened

    def answered(self, link: BlockLink, tier: str, elapsed_ms: float, now_ms: float) -> None:
        """Blocks of that tier were found."""
        self._fits.answered(link.peer, tier, link.probed_bytes_per_s, elapsed_ms, now_ms)

    def asked(self, link: BlockLink, tier: str, n_bytes: int, now_ms: float) -> None:
        """A load has begun."""
        self._fits.asked(link.peer, tier, link.probed_bytes_per_s, n_bytes, now_ms)

    def came(self, link: BlockLink, tier: str, n_bytes: int, elapsed_ms: float, now_ms: float) -> None:
        """A load by shared memory is here; moving it took so long."""
        self._fits.came(link.peer, tier, n_bytes, elapsed_ms, now_ms)

    def arrived(self, link: BlockLink, tier: str, n_bytes: int, asked_ms: float, now_ms: float) -> None:
        """Some of a load by message is here."""
        self._fits.arrived(link.peer, tier, n_bytes, asked_ms, now_ms)

    def ended(self, link: BlockLink, tier: str, n_bytes: int, now_ms: float, *, ok: bool) -> None:
        """A load has ended; `n_bytes` of it did not come."""
        if ok:
            self._fits.lost(link.peer, tier, n_bytes)
        else:
            self._fits.failed(link.peer, tier, n_bytes, now_ms)

    def forget(self, peer: PeerId) -> None:
        """The peer is gone."""
        self._fits.forget(peer)

    def links(self, now_ms: float) -> tuple[LinkCost, ...]:
        """For reports: what was measured."""
        return self._fits.measured(now_ms)


def slowest(tiers: Sequence[str]) -> str:
    """A run comes as fast as its slowest part; an empty one is `device`."""
    return next((tier for tier in _SLOWEST_FIRST if tier in tiers), "device")
