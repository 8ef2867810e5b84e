import pytest

from loadgen.traces.replay import Replay
from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.content import ContentSource, count_words
from loadgen.workload.plan import Content

IDS = ContentSource(last_token_id=30_000)


def replay(*sessions: Session, block_tokens: int = 4, seed: int = 1, source: ContentSource = IDS) -> Replay:
    return Replay(trace=Trace(format="x", sessions=sessions, block_tokens=block_tokens), source=source, seed=seed)


def alone(added_tokens: int, *hash_ids: int, content: Content | None = None) -> Session:
    return Session(
        requests=(TraceRequest(added_tokens=added_tokens, output_tokens=3, hash_ids=hash_ids, content=content),)
    )


def test_equal_ids_are_equal_blocks_and_others_are_not() -> None:
    workload = replay(alone(10, 1, 2, 3), alone(11, 1, 2, 9), alone(8, 3, 1))
    first, second, third = (workload.conversation(index).turns[0].added for index in range(3))
    assert [len(first), len(second), len(third)] == [10, 11, 8]
    assert first[:8] == second[:8]
    assert first[8:] != second[8:10]
    assert third[4:] == first[:4]
    assert third[:2] == first[8:]


@pytest.mark.parametrize("kind", ["ids", "words"])
def test_prompts_have_the_lengths_of_the_trace_in_either_kind(kind: str) -> None:
    workload = replay(alone(10, 1, 2, 3), alone(7), source=ContentSource(kind=kind))
    assert [count_words(workload.conversation(index).turns[0].added) for index in range(2)] == [10, 7]


def test_another_seed_sends_other_blocks() -> None:
    one, other = (replay(alone(8, 1, 2), seed=seed).conversation(0).turns[0].added for seed in (1, 2))
    assert one != other


def test_tokens_that_no_id_names_share_nothing() -> None:
    workload = replay(alone(12, 1), alone(12, 1), alone(8), alone(8))
    first, second, third, fourth = (workload.conversation(index).turns[0].added for index in range(4))
    assert first[:4] == second[:4]
    assert first[4:8] != second[4:8]
    assert third != fourth


def test_recorded_content_times_and_names_are_kept() -> None:
    session = Session(
        name="s",
        opening="be brief",
        requests=(
            TraceRequest(added_tokens=1, output_tokens=3, content="one?", at_s=2.0, think_s=9.0),
            TraceRequest(added_tokens=5, output_tokens=4, think_s=1.0, cancel_after_tokens=2),
        ),
    )
    conversation = replay(session).conversation(0)
    first, second = conversation.turns
    assert (conversation.session, conversation.opening, first.added) == ("s", "be brief", "one?")
    assert (first.at_s, first.think_s, second.think_s, second.cancel_after_tokens) == (2.0, 0.0, 1.0, 2)
    assert isinstance(second.added, str)
    assert len(second.added.split()) == 5


def test_there_is_nothing_beyond_the_last() -> None:
    workload = replay(alone(4))
    assert workload.n_conversations == 1
    with pytest.raises(IndexError):
        workload.conversation(1)
