"""Laws of who waits: in the order of arrival, and passed only by consent and only so often."""

from common.block_hash import BlockHash
from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.lineup import MOST_PASSES, Lineup
from services.worker.core.sequence import Sequence


def sequence(order: int, passed: int | None = None) -> Sequence:
    made = Sequence(
        request=RequestId(f"r{order}"),
        order=order,
        tokens=[1, 2],
        prompt_tokens=2,
        known_tokens=2,
        limit_tokens=4,
        sampling=Sampling(max_tokens=2),
        table=PageTable(1),
        root=BlockHash(bytes(16)),
    )
    made.passed = passed
    return made


def test_whoever_comes_back_has_the_place_of_its_arrival() -> None:
    lineup, made = Lineup(), [sequence(order) for order in range(4)]
    for one in (made[3], made[0], made[2], made[1]):
        lineup.run(one)
    assert lineup.running == made
    for one in (made[1], made[3], made[0]):
        lineup.wait(one)
    assert (list(lineup.waiting), lineup.running) == ([made[0], made[1], made[3]], [made[2]])


def test_who_gave_way_for_others_is_passed_so_often_and_no_more() -> None:
    lineup = Lineup()
    lineup.wait(sequence(1, passed=0))
    for _ in range(MOST_PASSES):
        assert lineup.may_pass()
        lineup.pass_by()
    assert not lineup.may_pass()


def test_who_gave_way_because_it_had_to_is_passed_by_nobody_who_came_later() -> None:
    lineup = Lineup()
    lineup.wait(sequence(1, passed=0))
    lineup.wait(sequence(3))
    assert not lineup.may_pass() and not lineup.may_pass(4)
    assert lineup.may_pass(2)
