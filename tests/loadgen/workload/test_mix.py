import pytest

from loadgen.workload.mix import ROUND, Mix, Part
from loadgen.workload.mix_text import parse_mix
from tests.loadgen.workload.made import made, plans


def mixed(*weights: float) -> Mix:
    parts = [
        Part(
            weight=weight,
            label=f"p{place}",
            workload=made("documents", f"s{place}", prefix_groups="4", share_ratio="2", prefix_len="8"),
        )
        for place, weight in enumerate(weights)
    ]
    return Mix(seed=1, parts=tuple(parts))


def test_every_round_has_the_exact_shares_in_an_order_of_its_own() -> None:
    workload = mixed(9, 1)
    groups = [workload.conversation(index).group for index in range(2 * ROUND)]
    assert groups[:ROUND].count("p1") == groups[ROUND:].count("p1") == ROUND // 10
    assert groups[:ROUND] != groups[ROUND:]
    assert "p1" in groups[: ROUND // 10]


def test_a_part_sees_its_own_places_without_holes() -> None:
    workload = mixed(2, 1)
    sent = [planned for planned in plans(workload, 60) if planned.group == "p1"]
    alone = plans(workload.parts[1].workload, len(sent))
    assert [planned.turns for planned in sent] == [planned.turns for planned in alone]
    assert [planned.opening for planned in sent] == [planned.opening for planned in alone]


def test_places_are_counted_over_the_whole_mix() -> None:
    assert [planned.index for planned in plans(mixed(1, 1), 10)] == list(range(10))


def test_a_weight_that_is_never_sent_is_refused() -> None:
    with pytest.raises(ValueError, match="never sent"):
        mixed(1, 0.0001)


def test_parts_are_datasets_or_shapes_with_their_options() -> None:
    short, long = parse_mix("0.9:random(isl=128,osl=64), 0.1:loogle(prefix-len=900)")
    assert (short.weight, short.label, short.dataset, str(short.options.isl)) == (0.9, "random", "random", "128")
    assert (long.weight, long.label, long.dataset) == (0.1, "loogle", "documents")
    assert (str(long.options.prefix_len), long.options.share_ratio) == ("900", 3)


def test_a_printed_mix_is_read_as_the_same_parts() -> None:
    parts = parse_mix("3:random(isl=lognormal:100:400:900),1:agent")
    assert parse_mix(",".join(map(str, parts))) == parts


def test_two_parts_of_one_name_are_told_apart() -> None:
    assert [part.label for part in parse_mix("1:random,1:random(isl=900),1:agent")] == ["random-1", "random-2", "agent"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be weight:name"),
        ("random", "must be weight:name"),
        ("1:random,", "must be weight:name"),
        ("1:random(isl=1", "not understood"),
        ("0:random", "above 0"),
        ("1:sonnet", "must be a dataset"),
        ("1:random(isl)", "option=value"),
        ("1:random(islands=4)", "no such option"),
        ("1:random(isl=ten)", "isl='ten'"),
        ("1:random(zipf=1)", "--zipf"),
    ],
)
def test_what_is_no_mix_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_mix(text)
