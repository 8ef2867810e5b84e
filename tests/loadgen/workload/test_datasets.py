import pytest

from loadgen.workload.datasets import DATASETS, complete
from loadgen.workload.options import parse_options
from loadgen.workload.plan import Conversation
from tests.loadgen.workload.made import made, plans


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_conversation_follows_from_seed_and_index_alone(dataset: str) -> None:
    forward = plans(made(dataset), 30)
    workload = made(dataset)
    assert [workload.conversation(index) for index in reversed(range(30))] == forward[::-1]
    assert [planned.index for planned in forward] == list(range(30))


@pytest.mark.parametrize("dataset", DATASETS)
def test_another_seed_sends_other_prompts_of_the_same_kind(dataset: str) -> None:
    one, other = (plans(made(dataset, seed), 20) for seed in ("1", "1/warmup"))
    assert not {p.opening[:8] for p in one if p.opening} & {p.opening[:8] for p in other if p.opening}
    assert not {p.turns[0].added[:8] for p in one} & {p.turns[0].added[:8] for p in other}


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_one_conversation_adds_no_other_adds(dataset: str) -> None:
    added = [turn.added for planned in plans(made(dataset), 40) for turn in planned.turns]
    assert len({content[:6] for content in added}) == len(added)


@pytest.mark.parametrize("dataset", DATASETS)
def test_scales_shorten_what_is_sent_and_what_is_asked_for(dataset: str) -> None:
    whole, quarter = (plans(made(dataset, scale=scale), 40) for scale in (1.0, 0.25))

    def sent(planned: list[Conversation]) -> int:
        return sum(len(p.opening) + sum(len(t.added) for t in p.turns) for p in planned)

    def asked(planned: list[Conversation]) -> int:
        return sum(turn.output_tokens for p in planned for turn in p.turns)

    assert sent(quarter) == pytest.approx(sent(whole) / 4, rel=0.1)
    assert asked(quarter) == pytest.approx(asked(whole) / 4, rel=0.1)


def test_a_random_prompt_has_the_lengths_of_its_laws() -> None:
    for planned in plans(made("random", isl="5-9", osl="3"), 30):
        (turn,) = planned.turns
        assert 5 <= len(turn.added) <= 9
        assert turn.output_tokens == 3
        assert planned.opening == ()


def test_a_chat_has_turns_pauses_and_a_shared_system_prompt() -> None:
    chats = plans(made("multi-turn", turns="2-5", think_time="1.5", isl="6", osl="4", prefix_len="20"), 30)
    assert {len(chat.turns) for chat in chats} == {2, 3, 4, 5}
    assert {chat.opening for chat in chats} == {chats[0].opening}
    assert len(chats[0].opening) == 20
    assert {chat.turns[0].think_s for chat in chats} == {0.0}
    assert {turn.think_s for chat in chats for turn in chat.turns[1:]} == {1.5}
    assert all(chat.keeps_answers for chat in chats)


def test_no_groups_give_every_chat_its_own_system_prompt() -> None:
    chats = plans(made("multi-turn", prefix_len="20", prefix_groups="0"), 30)
    assert len({chat.opening for chat in chats}) == 30


def test_an_agent_shares_its_tools_and_appends_observations() -> None:
    loops = plans(made("agent", prefix_len="100", isl="5", observation_len="11", turns="3", osl="4"), 10)
    assert len({loop.opening for loop in loops}) == 1
    assert [len(turn.added) for turn in loops[0].turns] == [5, 11, 11]


def test_every_document_is_read_by_exactly_its_share_of_sessions() -> None:
    sessions = plans(made("documents", prefix_len="20-40", prefix_groups="5", share_ratio="3"), 30)
    shelf = [session.opening for session in sessions[:15]]
    assert {shelf.count(document) for document in shelf} == {3}
    assert not set(shelf) & {session.opening for session in sessions[15:]}


def test_documents_together_are_read_one_after_the_other() -> None:
    sessions = plans(made("documents", prefix_groups="4", share_ratio="3", group_order="together"), 12)
    documents = [session.opening for session in sessions]
    assert documents[0::3] == documents[1::3] == documents[2::3]
    shuffled = [s.opening for s in plans(made("documents", prefix_groups="4", share_ratio="3"), 12)]
    assert shuffled[0::3] != shuffled[1::3]


@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        ("random", {"zipf": "1"}, "--zipf"),
        ("shared-prefix", {"turns": "3"}, "--turns"),
        ("shared-prefix", {"prefix_len": "9", "prefix_share": "0.5"}, "one of them"),
        ("shared-prefix", {"siblings": "4"}, "--group-order"),
        ("shared-prefix", {"group_order": "grouped", "zipf": "1"}, "--zipf"),
        ("shared-prefix", {"prefix_groups": "0"}, "1 or more"),
        ("multi-turn", {"prefix_groups": "4"}, "--prefix-len"),
        ("documents", {"group_order": "grouped"}, "together"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(dataset: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        complete(dataset, parse_options(options))
