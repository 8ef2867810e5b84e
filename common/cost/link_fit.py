"""What links have achieved lately, fitted from what was asked for and what came. Pure.

Rates and delays are moving averages of their logarithms: a sample counts with the weight `_WEIGHT`, and never as more
than `_CLAMP` times better or worse than what was believed, so one outlier moves an estimate by less than a factor of two
and a real change is believed after some samples. A load that fails counts as the worst sample. Without samples an estimate returns to where it began (the probed rate,
`_DELAY_MS`), by half in `_FORGET_MS`: a link that was found too slow is not asked any more, so it must recover by itself.
"""

from dataclasses import dataclass, field

from common.cost.link_cost import LinkCost

_WEIGHT = 0.3
_CLAMP = 7.0
_FORGET_MS = 30_000.0
_DELAY_MS = 1.0
_BYTES_PER_S = 256 * 2.0**20
"""Of a link that was not probed."""
_TOGETHER_MS = 1.0
"""Arrivals within it were heard of together, whenever they came."""
_LEAST = 1e-3
"""Of a delay (ms) and a duration: clocks tick."""


@dataclass(slots=True)
class _Estimate:
    """A positive number, believed since `at_ms`."""

    prior: float
    value: float
    at_ms: float
    before: float = 0.0
    """What was believed when the last sample came."""

    def at(self, now_ms: float) -> float:
        """What is left of it."""
        kept = 0.5 ** (max(0.0, now_ms - self.at_ms) / _FORGET_MS)
        return float(self.prior * (self.value / self.prior) ** kept)

    def add(self, sample: float, now_ms: float, *, again: bool = False) -> None:
        """A measurement. `again`: it includes the last one, and replaces it."""
        believed = self.before if again else self.at(now_ms)
        ratio = min(max(sample / believed, 1 / _CLAMP), _CLAMP)
        self.before, self.value, self.at_ms = believed, believed * ratio**_WEIGHT, now_ms


@dataclass(slots=True)
class _Arrivals:
    """By message: those that count as one sample."""

    first_ms: float = float("-inf")
    last_ms: float = float("-inf")
    """What was asked for before and has not come began to move then."""
    n_bytes: int = 0
    moving_ms: float = 0.0


@dataclass(slots=True)
class _Link:
    rate: _Estimate
    delay: _Estimate
    queued_bytes: int = 0
    measured: bool = False
    arrivals: _Arrivals = field(default_factory=_Arrivals)


class LinkFits:
    """Owns one estimate per (peer, tier) that was asked for, until `forget`."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], _Link] = {}

    def cost(self, peer: str, tier: str, probed_bytes_per_s: float, now_ms: float) -> LinkCost:
        """What is believed of a link now. `probed_bytes_per_s`: where to begin; 0: unknown."""
        link = self._links.get((peer, tier))
        if link is None:
            return LinkCost(peer, tier, probed_bytes_per_s or _BYTES_PER_S, _DELAY_MS)
        return _cost(peer, tier, link, now_ms)

    def answered(self, peer: str, tier: str, probed_bytes_per_s: float, delay_ms: float, now_ms: float) -> None:
        """The first word of what was asked for came so long after it was asked.

        Nothing is learned if bytes came by message meanwhile: it may have waited for them.
        """
        link = self._link(peer, tier, probed_bytes_per_s, now_ms)
        if link.arrivals.last_ms > now_ms - delay_ms:
            return
        link.delay.add(max(delay_ms, _LEAST), now_ms)
        link.measured = True

    def asked(self, peer: str, tier: str, probed_bytes_per_s: float, n_bytes: int, now_ms: float) -> None:
        """These bytes are on their way; `came` or `lost` ends it."""
        self._link(peer, tier, probed_bytes_per_s, now_ms).queued_bytes += n_bytes

    def came(self, peer: str, tier: str, n_bytes: int, elapsed_ms: float, now_ms: float) -> None:
        """Bytes that were asked for are here; moving them took so long. Unknown links are ignored: the peer died."""
        link = self._links.get((peer, tier))
        if link is not None:
            link.rate.add(n_bytes / max(elapsed_ms, _LEAST) * 1e3, now_ms)
            link.measured = True
        self.lost(peer, tier, n_bytes)

    def arrived(self, peer: str, tier: str, n_bytes: int, asked_ms: float, now_ms: float) -> None:
        """As `came`, of bytes by message: nobody sees when they began to move.

        That was not before the link's delay was over (of a quick answer: half of the time it took), nor while what was
        asked for before them was still coming.
        """
        link = self._links.get((peer, tier))
        if link is not None:
            asked_ms += min(link.delay.at(now_ms), (now_ms - asked_ms) / 2)
            last = link.arrivals
            one = _Arrivals(now_ms, now_ms, n_bytes, now_ms - max(asked_ms, last.last_ms))
            again = now_ms - last.first_ms < _TOGETHER_MS
            if again:
                one = _Arrivals(last.first_ms, now_ms, n_bytes + last.n_bytes, one.moving_ms + last.moving_ms)
            link.arrivals, link.measured = one, True
            link.rate.add(one.n_bytes / max(one.moving_ms, _LEAST) * 1e3, now_ms, again=again)
        self.lost(peer, tier, n_bytes)

    def failed(self, peer: str, tier: str, n_bytes: int, now_ms: float) -> None:
        """Bytes that were asked for will not come, though the peer is there: as bad as a sample can be."""
        link = self._links.get((peer, tier))
        if link is not None:
            link.rate.add(link.rate.at(now_ms) / _CLAMP, now_ms)
            link.arrivals, link.measured = _Arrivals(last_ms=link.arrivals.last_ms), True
        self.lost(peer, tier, n_bytes)

    def lost(self, peer: str, tier: str, n_bytes: int) -> None:
        """Bytes that were asked for will not come, and nobody knows why."""
        link = self._links.get((peer, tier))
        if link is not None:
            link.queued_bytes = max(0, link.queued_bytes - n_bytes)

    def forget(self, peer: str) -> None:
        """The peer is gone."""
        for key in [key for key in self._links if key[0] == peer]:
            del self._links[key]

    def measured(self, now_ms: float) -> tuple[LinkCost, ...]:
        """All links of which anything came, by peer and tier."""
        return tuple(_cost(*key, link, now_ms) for key, link in sorted(self._links.items()) if link.measured)

    def _link(self, peer: str, tier: str, probed_bytes_per_s: float, now_ms: float) -> _Link:
        link = self._links.get((peer, tier))
        if link is None:
            rate = probed_bytes_per_s or _BYTES_PER_S
            link = _Link(_Estimate(rate, rate, now_ms), _Estimate(_DELAY_MS, _DELAY_MS, now_ms))
            self._links[peer, tier] = link
        return link


def _cost(peer: str, tier: str, link: _Link, now_ms: float) -> LinkCost:
    return LinkCost(peer, tier, link.rate.at(now_ms), link.delay.at(now_ms), link.queued_bytes)
