"""The text of the rules: what it says, and what is refused with which words."""

import typing

import pytest

from common.faults.points import MESSAGES, Kind, Point, Side, kinds_of, points_of, sides_of
from common.faults.rules import Rule, parse_rules, rules_for
from common.ids import RequestId
from common.messages import AnyMessage
from common.messages.requests import Generate, Sampling


def test_a_text_says_what_its_rules_say() -> None:
    text = (
        "decode-0/grant: stop after=3 times=1 ; prefill/transfer: corrupt share=0.1 seed=7\n# nothing\nclock:jump ms=5"
    )
    assert parse_rules(text) == (
        Rule(process="decode-0", point=Point.GRANT, kind=Kind.STOP, after=3, times=1),
        Rule(process="prefill", point=Point.TRANSFER, kind=Kind.CORRUPT, share=0.1, seed=7),
        Rule(point=Point.CLOCK, kind=Kind.JUMP, ms=5.0),
    )


def test_an_empty_text_has_no_rules() -> None:
    assert parse_rules(" ;\n ; # comment") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grants:drop", "there is no point 'grants': allowed are route, prefill_queue"),
        ("grant:explode", "there is no kind 'explode': allowed are drop, delay"),
        ("compute:drop", "drop makes no sense at compute: allowed are delay, fail, kill, stop"),
        ("transfer:drop side=work", "drop makes no sense at transfer side=work: allowed are delay, corrupt"),
        ("compute:kill side=sent", "compute has no side sent: allowed are work"),
        ("grant:drop side=left", "there is no side 'left'"),
        ("grant", "must read"),
        ("grant:", "must read"),
        ("grant:drop when=1", "'when=1' is no key=value; allowed are share, after"),
        ("grant:drop times=1 times=2", "times is given twice"),
        ("grant:drop times=x", "times=x is no number"),
        ("grant:drop times=0", "times 1 or more"),
        ("grant:drop share=1.5", "share=1.5: must be above 0"),
        ("grant:drop share=nan", "share=nan: must be above 0"),
        ("grant:delay", "delay needs ms="),
        ("grant:drop ms=5", "drop has no ms: allowed are delay, reorder, jump"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="fault rule") as refused:
        parse_rules(f"grant:drop ; {text}")
    assert words in str(refused.value)
    assert text in str(refused.value)


def test_a_star_is_a_rule_at_every_point_that_messages_strike() -> None:
    rules = parse_rules("gateway-0/*: cut peer=decode")
    assert [rule.point for rule in rules] == list(MESSAGES)
    assert {(rule.process, rule.kind, rule.peer) for rule in rules} == {("gateway-0", Kind.CUT, "decode")}


def test_a_process_obeys_rules_of_everybody_and_of_its_prefix() -> None:
    rules = parse_rules("grant:drop ; decode/grant:drop ; decode-1/grant:drop")
    assert [rule.process for rule in rules_for(rules, "decode-0@ff")] == ["", "decode"]


def test_every_message_has_one_point() -> None:
    kinds = [kind for kinds in MESSAGES.values() for kind in kinds]
    assert sorted(kinds, key=str) == sorted(typing.get_args(AnyMessage), key=str)


def test_every_point_can_be_struck_and_ended_at_but_the_clock() -> None:
    for point in Point:
        assert sides_of(point)
        assert (Kind.KILL in kinds_of(point)) == (point is not Point.CLOCK)


def test_a_request_that_is_heard_is_routed_and_queued() -> None:
    message = Generate(request=RequestId("r"), model="m", prompt=(1,), sampling=Sampling(max_tokens=1), timeout_ms=1)
    assert points_of(message, Side.SENT) == (Point.ROUTE,)
    assert points_of(message, Side.HEARD) == (Point.ROUTE, Point.PREFILL_QUEUE)
