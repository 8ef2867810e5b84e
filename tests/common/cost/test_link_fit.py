"""What is believed of a link follows what it does, forgets, and is not moved far by one outlier."""

import itertools
import random

import pytest

from common.cost.link_fit import LinkFits

PEER, TIER, PROBED = "kvstore-0@1", "host", 1e9


def moved(fits: LinkFits, rate: float, *, now_ms: float = 0.0, n_bytes: int = 1_000_000) -> None:
    fits.asked(PEER, TIER, PROBED, n_bytes, now_ms)
    fits.came(PEER, TIER, n_bytes, n_bytes / rate * 1e3, now_ms)


def rate(fits: LinkFits, now_ms: float = 0.0) -> float:
    return fits.cost(PEER, TIER, PROBED, now_ms).bytes_per_s


def test_a_link_that_was_never_used_is_what_its_probe_said_and_is_not_reported() -> None:
    fits = LinkFits()
    assert rate(fits) == PROBED
    assert fits.cost(PEER, TIER, 0.0, 0.0).bytes_per_s > 0, "also if there was none"
    assert fits.measured(0.0) == ()


@pytest.mark.parametrize("true", [1e7, 2e8, 5e10])
def test_an_estimate_comes_to_the_true_rate_and_delay(true: float) -> None:
    fits, rng = LinkFits(), random.Random(1)
    for _ in range(40):
        moved(fits, true * rng.uniform(0.9, 1.1))
        fits.answered(PEER, TIER, PROBED, 20.0 * rng.uniform(0.9, 1.1), 0.0)
    (seen,) = fits.measured(0.0)
    assert seen.bytes_per_s == pytest.approx(true, rel=0.15)
    assert seen.delay_ms == pytest.approx(20.0, rel=0.15)


@pytest.mark.parametrize("outlier", [1.0, 1e15])
def test_one_outlier_moves_an_estimate_by_less_than_a_factor_of_two(outlier: float) -> None:
    fits = LinkFits()
    for _ in range(40):
        moved(fits, 2e8)
    before = rate(fits)
    moved(fits, outlier)
    assert 0.5 < rate(fits) / before < 2.0


def test_a_link_that_is_not_used_returns_to_its_probe() -> None:
    """Or one that was found too slow would never be asked again."""
    fits = LinkFits()
    for _ in range(40):
        moved(fits, 1e5)
    seen = [rate(fits, now_ms) for now_ms in (0.0, 30_000.0, 300_000.0)]
    assert seen[0] == pytest.approx(1e5, rel=0.1)
    assert seen[1] == pytest.approx(1e7, rel=0.1), "half the way of its logarithm"
    assert seen[2] == pytest.approx(PROBED, rel=0.1)


def test_queued_bytes_are_those_asked_for_that_neither_came_nor_are_lost() -> None:
    fits = LinkFits()
    for _ in range(3):
        fits.asked(PEER, TIER, PROBED, 100, 0.0)
    fits.came(PEER, TIER, 60, 1.0, 0.0)
    fits.lost(PEER, TIER, 40)
    assert fits.cost(PEER, TIER, PROBED, 0.0).queued_bytes == 200
    fits.lost(PEER, TIER, 100)
    fits.came(PEER, TIER, 100, 1.0, 0.0)
    assert fits.cost(PEER, TIER, PROBED, 0.0).queued_bytes == 0


def test_bytes_and_time_of_nothing_break_nothing() -> None:
    fits = LinkFits()
    fits.asked(PEER, TIER, PROBED, 0, 0.0)
    fits.came(PEER, TIER, 0, 0.0, 0.0)
    fits.answered(PEER, TIER, PROBED, 0.0, 0.0)
    assert fits.cost(PEER, TIER, PROBED, 0.0).fetch_ms(100) > 0


def test_a_peer_that_is_gone_leaves_nothing_and_what_ends_late_is_ignored() -> None:
    fits = LinkFits()
    fits.asked(PEER, TIER, PROBED, 100, 0.0)
    moved(fits, 1e7)
    fits.forget(PEER)
    fits.came(PEER, TIER, 100, 1.0, 0.0)
    fits.lost(PEER, TIER, 100)
    assert fits.measured(0.0) == () and rate(fits) == PROBED


def test_tiers_of_one_peer_are_told_apart() -> None:
    fits = LinkFits()
    fits.answered(PEER, "disk", PROBED, 50.0, 0.0)
    fits.answered(PEER, "host", PROBED, 0.5, 0.0)
    assert [(link.tier, link.delay_ms > 1.0) for link in fits.measured(0.0)] == [("disk", True), ("host", False)]


class Wire:
    """A link on which bytes move one load after the other, at 1e9 B/s after a delay; whoever waits for them asks again."""

    def __init__(self, fits: LinkFits, in_flight: int, n_bytes: int, delay_ms: float, seed: int) -> None:
        self.fits, self.n_bytes, self.delay_ms, self.rng = fits, n_bytes, delay_ms, random.Random(seed)
        self.free_ms = 0.0
        self.coming: list[tuple[float, float]] = []  # arrival, when it was asked for
        for _ in range(in_flight):
            self.ask(0.0)

    def ask(self, now_ms: float) -> None:
        self.fits.asked(PEER, TIER, PROBED, self.n_bytes, now_ms)
        takes_ms = self.n_bytes / 1e6 * self.rng.uniform(0.9, 1.1)
        self.free_ms = max(self.free_ms, now_ms + self.delay_ms) + takes_ms
        self.coming.append((self.free_ms, now_ms))

    def run(self, loads: int, heard_every_ms: float) -> float:
        """Arrivals are heard of at whole multiples, all that are there; 0: at once. Returns the time."""
        now_ms = 0.0
        while loads > 0 or self.coming[0][0] <= now_ms:
            came_ms, asked_ms = self.coming.pop(0)
            now_ms = -(-came_ms // heard_every_ms) * heard_every_ms if heard_every_ms else came_ms
            self.fits.arrived(PEER, TIER, self.n_bytes, asked_ms, now_ms)
            self.ask(now_ms)
            loads -= 1
        return now_ms


@pytest.mark.parametrize("prior", [1e8, 1e9, 1e10])
@pytest.mark.parametrize("heard_every_ms", [0.0, 2.0, 5.0])
@pytest.mark.parametrize("delay_ms", [0.0, 10.0])
@pytest.mark.parametrize(("in_flight", "n_bytes"), [(1, 10**8), (2, 10**8), (8, 10**8), (64, 10**7), (64, 10**6)])
def test_what_loads_wait_for_each_other_by_message_is_not_taken_for_the_links_rate(
    in_flight: int, n_bytes: int, delay_ms: float, heard_every_ms: float, prior: float
) -> None:
    """The bytes that wait count once: as queued ones."""
    fits = LinkFits()
    fits.asked(PEER, TIER, prior, 0, 0.0)
    for _ in range(30):
        fits.answered(PEER, TIER, prior, delay_ms, 0.0)
    wire = Wire(fits, in_flight, n_bytes, delay_ms, seed=1)
    now_ms = wire.run(100 * max(1, in_flight // 8), heard_every_ms)
    cost = fits.cost(PEER, TIER, PROBED, now_ms)
    assert cost.bytes_per_s == pytest.approx(1e9, rel=0.2)
    wire.ask(now_ms)
    assert cost.fetch_ms(n_bytes) == pytest.approx(wire.coming[-1][0] - now_ms, rel=0.3)


def test_a_word_that_may_have_waited_behind_bytes_says_nothing_of_the_delay() -> None:
    fits = LinkFits()
    fits.asked(PEER, TIER, PROBED, 10**8, 0.0)
    fits.arrived(PEER, TIER, 10**8, 0.0, 100.0)
    before = fits.cost(PEER, TIER, PROBED, 101.0).delay_ms
    fits.answered(PEER, TIER, PROBED, 90.0, 101.0)
    assert fits.cost(PEER, TIER, PROBED, 101.0).delay_ms == before
    fits.answered(PEER, TIER, PROBED, 90.0, 300.0)
    assert fits.cost(PEER, TIER, PROBED, 300.0).delay_ms > 1.5 * before


def test_a_link_whose_loads_fail_gets_worse_every_time_and_recovers_unused() -> None:
    fits = LinkFits()
    moved(fits, 1e9)
    seen = [rate(fits)]
    for _ in range(4):
        fits.asked(PEER, TIER, PROBED, 100, 0.0)
        fits.failed(PEER, TIER, 100, 0.0)
        seen.append(rate(fits))
    assert all(0.5 < after / before < 0.6 for before, after in itertools.pairwise(seen))
    assert fits.cost(PEER, TIER, PROBED, 0.0).queued_bytes == 0
    assert rate(fits, 600_000.0) == pytest.approx(PROBED, rel=0.1)
    fits.forget(PEER)
    fits.failed(PEER, TIER, 100, 0.0)
    assert fits.measured(0.0) == (), "it died: that says nothing of the next life"
