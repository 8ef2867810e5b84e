import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest

from common.errors import ConfigError
from loadgen.traces.facts import facts_of
from loadgen.traces.make import made_trace
from loadgen.traces.mooncake import read_mooncake
from loadgen.traces.own import read_own
from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.traces.write import mooncake_lines, own_lines
from loadgen.workload.plan import Conversation, Turn
from tests.loadgen.workload.made import made

MOONCAKE = [
    json.dumps({"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]}),
    json.dumps({"timestamp": 1500, "input_length": 600, "output_length": 6, "hash_ids": [7, 11]}),
]
MIXED = Trace(
    format="custom",
    sessions=(
        Session(requests=(TraceRequest(added_tokens=5, output_tokens=1, at_s=0.0, content=(1, 2, 3, 4, 5)),)),
        Session(
            name="s",
            opening="be brief",
            requests=(
                TraceRequest(added_tokens=1, output_tokens=9, at_s=1.5, content="one?"),
                TraceRequest(added_tokens=1, output_tokens=9, think_s=0.25, content="two?", cancel_after_tokens=3),
            ),
        ),
        Session(requests=(TraceRequest(added_tokens=9, output_tokens=1, at_s=2.0, hash_ids=(4, 5, 6)),)),
    ),
    block_tokens=4,
)


def text(lines: Iterable[bytes]) -> list[str]:
    return [line.decode() for line in lines]


def test_our_own_form_gives_the_same_trace_back() -> None:
    assert read_own(text(own_lines(MIXED)), "f").sessions == MIXED.sessions
    assert read_own(text(own_lines(MIXED)), "f").block_tokens == 4


def test_a_mooncake_trace_comes_back_from_our_form_as_it_was() -> None:
    ours = read_own(text(own_lines(read_mooncake(MOONCAKE, "f"))), "g")
    assert [json.loads(line) for line in mooncake_lines(ours, 512)] == [json.loads(line) for line in MOONCAKE]


def test_sessions_of_one_name_stay_apart() -> None:
    session = Session(name="s", requests=(TraceRequest(added_tokens=1, output_tokens=1),))
    again = read_own(text(own_lines(replace(MIXED, sessions=(session, session)))), "f")
    assert len(again.sessions) == 2


def test_other_blocks_keep_what_is_shared() -> None:
    lines = text(mooncake_lines(read_mooncake(MOONCAKE, "f"), 128))
    first, second = (json.loads(line)["hash_ids"] for line in lines)
    assert [len(set(first)), len(set(second))] == [6, 5]
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])
    assert read_mooncake(lines, "f", 128).n_requests == 2


def alone(
    content: tuple[int, ...] | None = None, opening: tuple[int, ...] = (), hash_ids: tuple[int, ...] = ()
) -> Session:
    request = TraceRequest(added_tokens=4, output_tokens=1, at_s=0.0, content=content, hash_ids=hash_ids)
    return Session(requests=(request,), opening=opening)


@pytest.mark.parametrize(
    "sessions",
    [
        (alone(content=(1, 2, 9, 9)), alone(content=(3, 4, 9, 9))),
        (alone(opening=(1, 2), hash_ids=(5, 6)), alone(opening=(3, 4), hash_ids=(5, 6))),
    ],
)
def test_equal_blocks_after_unequal_beginnings_have_other_names(sessions: tuple[Session, ...]) -> None:
    trace = Trace(format="x", sessions=sessions, block_tokens=2)
    first, second = (json.loads(line)["hash_ids"] for line in mooncake_lines(trace, 2))
    assert not set(first) & set(second)


def test_mooncake_lines_come_in_the_order_of_times() -> None:
    turns = (
        TraceRequest(added_tokens=8, output_tokens=4, at_s=0.0),
        TraceRequest(added_tokens=4, output_tokens=2, think_s=5.0),
    )
    late = TraceRequest(added_tokens=8, output_tokens=4, at_s=2.0)
    lines = mooncake_lines(Trace(format="x", sessions=(Session(requests=turns), Session(requests=(late,)))), 4)
    assert [json.loads(line)["timestamp"] for line in lines] == [0, 2000, 5000]


def test_a_conversation_becomes_requests_with_the_whole_history() -> None:
    turns = (
        TraceRequest(added_tokens=8, output_tokens=4, at_s=1.0),
        TraceRequest(added_tokens=4, output_tokens=2, think_s=0.5),
    )
    lines = mooncake_lines(Trace(format="x", sessions=(Session(requests=turns),)), 4)
    first, second = (json.loads(line) for line in lines)
    assert (second["timestamp"], second["input_length"]) == (1500, 16)
    assert second["hash_ids"][:2] == first["hash_ids"]


def test_named_blocks_keep_their_names_in_later_turns() -> None:
    rows = [
        {"t": 0.0, "session": "s", "turn": 0, "isl": 32, "osl": 16, "hash_ids": [0, 1], "block": 16},
        {"session": "s", "turn": 1, "isl": 16, "osl": 16},
        {"session": "s", "turn": 2, "isl": 16, "osl": 16},
    ]
    trace = read_own([json.dumps(row) for row in rows], "f")
    first, second, third = (tuple(json.loads(line)["hash_ids"]) for line in mooncake_lines(trace, 16))
    assert first == (0, 1)
    assert (second[:2], third[:4]) == (first, second)


def test_mooncake_needs_times() -> None:
    untimed = Trace(format="x", sessions=(Session(requests=(TraceRequest(added_tokens=1, output_tokens=1),)),))
    with pytest.raises(ConfigError, match="needs times"):
        list(mooncake_lines(untimed, 512))


def test_a_made_trace_keeps_what_prompts_share() -> None:
    workload = made("shared-prefix", prefix_groups="2", prefix_len="32", isl="8", osl="5")
    trace = made_trace(workload, 40, 2.0, 8, 1)
    facts = facts_of(read_own(text(own_lines(trace)), "f"))
    assert facts.requests == 40
    assert facts.ideal_hit_share == pytest.approx((40 - 2) * 4 / (40 * 5))
    assert trace == made_trace(workload, 40, 2.0, 8, 1)


@dataclass(frozen=True)
class _Listed:
    listed: tuple[Conversation, ...]

    @property
    def n_conversations(self) -> int:
        return len(self.listed)

    def conversation(self, index: int) -> Conversation:
        return self.listed[index]


def test_a_made_trace_names_blocks_by_all_that_is_before_them() -> None:
    prompts = ((1, 2), (3, 4), (1, 2))
    listed = [
        Conversation(index=place, opening=opening, turns=(Turn(added=(9, 9), output_tokens=1),))
        for place, opening in enumerate(prompts)
    ]
    trace = made_trace(_Listed(tuple(listed)), 3, 1.0, 2, 0)
    assert [session.requests[0].hash_ids for session in trace.sessions] == [(0, 1), (2, 3), (0, 1)]


def test_a_made_trace_has_its_rate_and_counts_turns() -> None:
    trace = made_trace(made("multi-turn", turns="3", isl="4"), 601, 5.0, 8, 1)
    assert trace.n_requests == 601
    assert len(trace.sessions) == 201
    assert 200 / (trace.sessions[-1].requests[0].at_s or 0.0) == pytest.approx(5, rel=0.2)
