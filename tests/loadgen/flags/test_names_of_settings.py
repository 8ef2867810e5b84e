"""Sets that name settings name only such as a result holds."""

from collections.abc import Set

import pytest

from loadgen.flags.run import parse
from loadgen.output.html.run_view import NOT_A_KIND
from loadgen.output.html.sections.facts import SAID_ELSEWHERE
from loadgen.settings import shown
from loadgen.stats.compare import NOT_THE_WORK, SAME_AS_FACTS

WITH_EVERYTHING = (
    "--url http://x --header a=b --label c=d --rate 2 --model m --seed 1 --goodput ttft:5 --warmup 1",
    "--cluster 1P1D --cluster-flags=--verbose --concurrency 2 --duration 3 --num-requests 4",
)
HELD = {name for flags in WITH_EVERYTHING for name in shown(parse(flags.split(), {}))}


@pytest.mark.parametrize("named", [NOT_A_KIND, SAID_ELSEWHERE, NOT_THE_WORK, SAME_AS_FACTS])
def test_a_setting_that_is_named_can_be_in_a_result(named: Set[str]) -> None:
    assert named <= HELD
