from loadgen.workload.cancels import WithCancels
from loadgen.workload.plan import Turn
from tests.loadgen.workload.made import made


def turns(rate: float, osl: str = "2-9", n: int = 600) -> list[Turn]:
    workload = WithCancels(workload=made("multi-turn", turns="2", isl="4", osl=osl), seed=1, rate=rate)
    return [turn for index in range(n // 2) for turn in workload.conversation(index).turns]


def test_cancellations_follow_the_rate_and_fall_within_the_answer() -> None:
    cancelled = [turn for turn in turns(0.2) if turn.cancel_after_tokens is not None]
    assert 90 < len(cancelled) < 150
    assert all(0 <= (turn.cancel_after_tokens or 0) < turn.output_tokens for turn in cancelled)
    assert {turn.cancel_after_tokens for turn in turns(1.0, osl="3")} == {0, 1, 2}


def test_the_same_turns_stay_cancelled_when_lengths_change_or_the_rate_grows() -> None:
    def places(found: list[Turn]) -> set[int]:
        return {place for place, turn in enumerate(found) if turn.cancel_after_tokens is not None}

    assert places(turns(0.2)) == places(turns(0.2, osl="50"))
    assert places(turns(0.2)) < places(turns(0.4))
