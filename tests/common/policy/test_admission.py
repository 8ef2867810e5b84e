"""The gate lets in as much as nobody is hurt by, and never holds anybody for nothing."""

import random

import pytest

from common.policy.admission import Drawing, FirstComeFirstServed, SlackGate

SLO_MS = 200


def drawings(draw: random.Random, most: int = 6) -> list[Drawing]:
    """Whole numbers, so that sums are exact."""
    return [
        Drawing(draw.randrange(60), draw.randrange(9000), draw.randrange(60), draw.randrange(20, 260))
        for _ in range(draw.randrange(most))
    ]


def test_slack_is_what_the_slo_allows_in_all_less_what_was_and_will_be_taken() -> None:
    assert Drawing(10, 700.0, 5, 100.0).slack_ms(200.0) == 15 * 200.0 - 700.0 - 500.0
    assert Drawing(10, 2500.0, 5, 110.0).slack_ms(200.0) == -50.0


def test_as_many_are_admitted_as_trying_every_number_finds() -> None:
    draw, gate = random.Random(2), SlackGate(SLO_MS)
    for _ in range(3000):
        running, prompts = drawings(draw), [draw.randrange(1500) for _ in range(draw.randrange(8))]
        slacks = [slack for one in running if (slack := one.slack_ms(SLO_MS)) >= 0]

        def nobody_is_hurt(n: int, slacks: list[float] = slacks, prompts: list[int] = prompts) -> bool:
            return all(sum(prompts[:n]) <= slack for slack in slacks)

        assert gate.admit(running, prompts) == max(n for n in range(len(prompts) + 1) if nobody_is_hurt(n))


def test_whoever_could_keep_the_slo_still_can_after_the_admitted_prompts() -> None:
    draw, gate = random.Random(3), SlackGate(SLO_MS)
    for _ in range(2000):
        running, prompts = drawings(draw), [draw.randrange(1500) for _ in range(8)]
        lost_ms = sum(prompts[: gate.admit(running, prompts)])
        for one in running:
            if one.slack_ms(SLO_MS) >= 0:
                after = Drawing(one.past_tokens, one.past_ms + lost_ms, one.future_tokens, one.tpot_ms)
                assert after.slack_ms(SLO_MS) >= 0


@pytest.mark.parametrize(("gate", "keeps"), [(SlackGate(SLO_MS), True), (FirstComeFirstServed(), False)])
def test_with_lengths_foretold_rightly_nobody_s_mean_time_per_token_breaks_the_slo(
    gate: SlackGate | FirstComeFirstServed, keeps: bool
) -> None:
    """A device that either computes one prompt or gives every drawing request a token, each in 100 ms."""
    draw = random.Random(4)
    now_ms = 0
    waiting: list[tuple[int, int, int]] = []  # arrived at, time to compute, tokens after the first
    running: list[list[int]] = []  # first token at, drawn since, tokens
    arrivals = sorted((draw.randrange(30_000), draw.randrange(50, 900), draw.randrange(2, 40)) for _ in range(60))
    mean_ms: list[float] = []
    while arrivals or waiting or running:
        while arrivals and arrivals[0][0] <= now_ms:
            waiting.append(arrivals.pop(0))
        views = [Drawing(drawn, now_ms - first, tokens - drawn, 100) for first, drawn, tokens in running]
        if waiting and gate.admit(views, [waiting[0][1]]):
            _, prefill_ms, tokens = waiting.pop(0)
            now_ms += prefill_ms
            running.append([now_ms, 0, tokens])
            continue
        now_ms += 100
        for one in running:
            one[1] += 1
        mean_ms += [(now_ms - first) / tokens for first, drawn, tokens in running if drawn == tokens]
        running = [one for one in running if one[1] < one[2]]
    assert len(mean_ms) == 60
    assert (max(mean_ms) <= SLO_MS) is keeps


def test_who_cannot_keep_the_slo_any_more_holds_nobody_back() -> None:
    hopeless, relaxed = Drawing(10, 9000.0, 5, 100.0), Drawing(10, 1000.0, 5, 100.0)  # slacks -6500 and 1500
    gate = SlackGate(SLO_MS)
    assert gate.admit([hopeless], [10.0, 1e9]) == 2
    assert gate.admit([hopeless, relaxed], [1000.0, 500.0, 1.0]) == 2


def test_who_gives_its_place_to_others_too_often_but_could_still_be_in_time_holds_every_prompt() -> None:
    crowded = Drawing(10, 1000.0, 5, 500.0, least_tpot_ms=100.0)  # slack -500, and 1500 if nobody took turns with it
    lost = Drawing(10, 3000.0, 5, 500.0, least_tpot_ms=100.0)
    assert SlackGate(SLO_MS).admit([crowded, lost], [1.0]) == 0
    assert SlackGate(SLO_MS).admit([lost], [1.0]) == 1


def test_who_may_yet_get_long_enough_to_be_in_time_is_not_given_up() -> None:
    perhaps = Drawing(10, 4000.0, 5, 100.0, most_tokens=20)  # slack -1500, and 0 if it gets 20 tokens more
    short = Drawing(10, 4000.0, 5, 100.0, most_tokens=19)
    assert SlackGate(SLO_MS).admit([perhaps], [1.0]) == 0
    assert SlackGate(SLO_MS).admit([short], [1.0]) == 1


def test_with_nobody_to_protect_everybody_is_admitted() -> None:
    assert SlackGate(SLO_MS).admit([], [1e12, float("inf")]) == 2
    assert FirstComeFirstServed().admit([Drawing(1, 9e9, 1, 9e9)], [1e12] * 3) == 3


def test_order_of_arrival_is_kept_a_short_prompt_does_not_pass_a_long_one() -> None:
    relaxed = Drawing(10, 1000.0, 5, 100.0)
    assert SlackGate(SLO_MS).admit([relaxed], [1501.0, 1.0]) == 0


def test_an_slo_that_is_no_time_is_refused() -> None:
    for slo_ms in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            SlackGate(slo_ms)
