"""LayerKV's trade in virtual time, small: what parking gains for first tokens, and what the gate keeps for the others."""

import pytest

from benchmarks._layer_kv import Device, poisson
from benchmarks.layer_kv_virtual import COST, KV_TOKENS, LAYERS, SLO, TOKEN_BYTES, Run, looped

DEVICE = Device(
    cost=COST,
    layers=LAYERS,
    layer_token_bytes=TOKEN_BYTES // LAYERS,
    kv_tokens=KV_TOKENS,
    link_bytes_per_s=25e9,
    host_tokens=10**9,
)


def run(prompt_tokens: int, output_tokens: int, n: int, per_s: float, *, layer_wise: bool, gated: bool = False) -> Run:
    jobs = poisson(n, per_s, prompt_tokens, output_tokens, seed=0)
    return looped(DEVICE, jobs, layer_wise=layer_wise, gated=gated)


def late(found: Run) -> int:
    return sum(one.tpot_ms > SLO.tpot_ms for one in found.times)


def test_where_there_is_time_to_spare_first_tokens_come_early_and_the_gate_holds_nobody() -> None:
    base, free, gated = (
        run(2048, 512, 50, 1.0, layer_wise=layer_wise, gated=gate)
        for layer_wise, gate in ((False, False), (True, False), (True, True))
    )
    assert free.mean_ms < base.mean_ms / 10 and late(free) == 0
    assert gated.times == free.times
    assert free.tokens_per_s > 0.97 * base.tokens_per_s


def test_where_there_is_none_the_gate_keeps_every_answer_in_time_that_would_all_be_late() -> None:
    free, gated = (run(4096, 64, 40, 2.0, layer_wise=True, gated=gate) for gate in (False, True))
    assert late(free) == 40 and late(gated) == 0
    assert gated.tokens_per_s > 0.97 * free.tokens_per_s


@pytest.mark.parametrize("gated", [False, True])
def test_with_room_for_all_nothing_is_parked_and_nothing_is_changed(gated: bool) -> None:
    base, parked = run(1024, 64, 30, 0.5, layer_wise=False), run(1024, 64, 30, 0.5, layer_wise=True, gated=gated)
    assert parked.parked_gb == 0 and parked.times == base.times
