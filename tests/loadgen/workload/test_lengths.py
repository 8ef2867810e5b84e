from random import Random

import pytest

from loadgen.workload.lengths import Fixed, Normal, Uniform, parse_lengths


@pytest.mark.parametrize(
    ("text", "law"),
    [("128", Fixed(128)), ("128:16", Normal(128.0, 16.0)), ("12.5:2", Normal(12.5, 2.0)), ("64-256", Uniform(64, 256))],
)
def test_every_form_is_read(text: str, law: object) -> None:
    assert parse_lengths(text) == law


@pytest.mark.parametrize("text", ["", "0", "-3", "ten", "256-64", "1.5", "8:", "0-9"])
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
