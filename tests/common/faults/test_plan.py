"""Which hits are faulty: the same ones for the same rules and hits."""

from common.faults.plan import FaultPlan
from common.faults.points import Kind, Point, Side
from common.faults.rules import parse_rules


def struck(text: str, n_hits: int = 200, peer: str = "") -> list[bool]:
    plan = FaultPlan(parse_rules(text))
    return [bool(plan.hit(Point.GRANT, Side.SENT, peer).faults) for _ in range(n_hits)]


def test_a_rule_strikes_its_share_of_hits_and_another_seed_others() -> None:
    one, again, other = (struck(f"grant:drop share=0.25 seed={seed}") for seed in (1, 1, 2))
    assert 30 <= sum(one) <= 70
    assert one == again != other


def test_rules_that_read_alike_draw_apart() -> None:
    plan = FaultPlan(parse_rules("grant:drop share=0.5;grant:drop share=0.5"))
    counts = {len(plan.hit(Point.GRANT, Side.SENT).faults) for _ in range(50)}
    assert counts == {0, 1, 2}


def test_a_rule_is_not_moved_by_hits_of_another() -> None:
    alone = struck("grant:drop share=0.5")
    plan = FaultPlan(parse_rules("grant:drop share=0.5;commit:kill;grant:stop after=999"))
    both = []
    for _ in range(200):
        plan.hit(Point.COMMIT, Side.SENT)
        both.append(bool(plan.hit(Point.GRANT, Side.SENT).faults))
    assert both == alone


def test_after_skips_and_times_ends() -> None:
    assert struck("grant:drop after=3 times=2", 8) == [False] * 3 + [True] * 2 + [False] * 3


def test_a_rule_with_peer_or_side_leaves_others_alone() -> None:
    plan = FaultPlan(parse_rules("grant:drop peer=decode side=heard"))
    assert not plan.hit(Point.GRANT, Side.HEARD, "prefill-0").faults
    assert not plan.hit(Point.GRANT, Side.SENT, "decode-0").faults
    (fault,) = plan.hit(Point.GRANT, Side.HEARD, "decode-0").faults
    assert fault.hit == 1  # the others were no hits of this rule


def test_a_cut_strikes_one_peer_both_ways_from_then_on() -> None:
    plan = FaultPlan(parse_rules("grant:cut after=1 times=1"))
    hits = [("a", Side.SENT), ("a", Side.SENT), ("a", Side.HEARD), ("b", Side.SENT), ("a", Side.SENT)]
    outcomes = [plan.hit(Point.GRANT, side, peer) for peer, side in hits]
    assert [outcome.has(Kind.CUT) for outcome in outcomes] == [False, True, True, False, True]
    assert [fault.news for outcome in outcomes for fault in outcome.faults] == [True, False, False]


def test_corrupt_without_a_side_means_kv_where_there_may_be_some() -> None:
    plan = FaultPlan(parse_rules("transfer:corrupt"))
    assert not plan.hit(Point.TRANSFER, Side.SENT).faults
    assert plan.hit(Point.TRANSFER, Side.SENT, carries_kv=True).faults
    assert plan.hit(Point.TRANSFER, Side.WORK).faults
    named = FaultPlan(parse_rules("transfer:corrupt side=sent"))
    assert named.hit(Point.TRANSFER, Side.SENT).faults


def test_what_was_injected_is_counted() -> None:
    plan = FaultPlan(parse_rules("grant:drop times=2;grant:delay ms=5"))
    delays = [plan.hit(Point.GRANT, Side.SENT).ms_of(Kind.DELAY) for _ in range(3)]
    assert delays == [5.0] * 3
    assert plan.injected == {(Point.GRANT, Kind.DROP): 2, (Point.GRANT, Kind.DELAY): 3}
