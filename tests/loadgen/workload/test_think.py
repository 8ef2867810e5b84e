from random import Random

import pytest

from loadgen.workload.think import ExponentialPause, FixedPause, LogNormalPause, parse_think


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("2.5", FixedPause(2.5)),
        ("0", FixedPause(0.0)),
        ("exp:5", ExponentialPause(5.0)),
        ("lognormal:4:20:120", LogNormalPause(4, 20, 120)),
    ],
)
def test_every_form_is_read_and_printed_alike(text: str, law: object) -> None:
    assert parse_think(text) == law
    assert str(law) == text


def test_fixed_may_be_said() -> None:
    assert parse_think("fixed:3") == FixedPause(3.0)


@pytest.mark.parametrize(
    "text", ["", "-1", "exp:0", "exp", "lognormal:5:4", "lognormal:0:4", "lognormal:4:20:3", "soon"]
)
def test_what_is_no_pause_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="exp:mean"):
        parse_think(text)


def test_an_exponential_pause_has_its_mean() -> None:
    random = Random(0)
    assert sum(ExponentialPause(5.0).draw_s(random) for _ in range(4000)) / 4000 == pytest.approx(5, rel=0.05)


def test_a_lognormal_pause_has_its_median_and_its_most() -> None:
    random = Random(0)
    drawn_s = sorted(LogNormalPause(4, 20, 60).draw_s(random) for _ in range(2001))
    assert drawn_s[1000] == pytest.approx(4, rel=0.1)
    assert drawn_s[-1] == 60
