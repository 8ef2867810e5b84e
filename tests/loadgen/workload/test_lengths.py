from random import Random

import pytest

from loadgen.workload.lengths import MOST_TOKENS, Fixed, LogNormal, Normal, Uniform, parse_lengths


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("128", Fixed(128)),
        ("128:16", Normal(128.0, 16.0)),
        ("12.5:2", Normal(12.5, 2.0)),
        ("64-256", Uniform(64, 256)),
        ("lognormal:200:900", LogNormal(200.0, 900.0)),
        ("lognormal:200.5:900:4096", LogNormal(200.5, 900.0, 4096)),
    ],
)
def test_every_form_is_read_and_printed_alike(text: str, law: object) -> None:
    assert parse_lengths(text) == law
    assert str(law) == text


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "ten", "256-64", "1.5", "8:", "0-9", "lognormal:9", "lognormal:9:8", "lognormal:9:10:8"]
)
def test_what_is_no_length_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_lengths(text)


def test_a_normal_length_is_never_below_one() -> None:
    random = Random(0)
    drawn = [Normal(2.0, 10.0).draw_tokens(random) for _ in range(500)]
    assert min(drawn) == 1
    assert max(drawn) > 10


def test_a_uniform_length_reaches_both_ends() -> None:
    random = Random(0)
    assert {Uniform(3, 5).draw_tokens(random) for _ in range(100)} == {3, 4, 5}


def test_a_lognormal_length_has_its_median_its_90th_percentile_and_its_most() -> None:
    random = Random(0)
    drawn = sorted(LogNormal(100.0, 400.0, 1000).draw_tokens(random) for _ in range(4000))
    assert drawn[2000] == pytest.approx(100, rel=0.1)
    assert drawn[3600] == pytest.approx(400, rel=0.1)
    assert drawn[-1] == 1000
    assert drawn[0] >= 1


@pytest.mark.parametrize("text", ["1000", "1000:100", "500-1500", "lognormal:1000:2000:4000"])
def test_a_scaled_law_draws_scaled_lengths_and_none_below_one(text: str) -> None:
    law = parse_lengths(text)
    whole, tenth = (sum(one.draw_tokens(Random(i)) for i in range(200)) for one in (law, law.scaled(0.1)))
    assert tenth == pytest.approx(whole / 10, rel=0.01)
    assert {law.scaled(1e-6).draw_tokens(Random(i)) for i in range(50)} == {1}


HUGE = "9" * 20


@pytest.mark.parametrize(
    "text",
    [
        "10000001",
        HUGE,
        "9" * 5000,
        f"{HUGE}:1",
        f"8:{HUGE}",
        f"8-{HUGE}",
        f"lognormal:8:{HUGE}",
        f"lognormal:8:9:{HUGE}",
    ],
)
def test_absurd_lengths_are_refused_with_the_most(text: str) -> None:
    with pytest.raises(ValueError, match=r"^.{1,90}must not exceed 10000000 tokens"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["10000000", "10000000:10000000", "lognormal:1:10000000"])
def test_no_law_draws_more_than_the_most(text: str) -> None:
    law, random = parse_lengths(text), Random(0)
    assert max(law.draw_tokens(random) for _ in range(300)) == MOST_TOKENS
