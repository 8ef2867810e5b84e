"""The tables are the protocol, and the README shows them."""

from pathlib import Path

import pytest

from common.errors import ProtocolViolation
from kvstore.handover.states import RECEIVER, SENDER, ReceiverEvent, ReceiverState, SenderState, advance, mermaid

README = Path(__file__).parents[3] / "kvstore" / "README.md"


@pytest.mark.parametrize("table", [RECEIVER, SENDER], ids=["receiver", "sender"])
def test_the_readme_shows_the_table(table: object) -> None:
    assert f"```mermaid\n{mermaid(table)}\n```" in README.read_text()


def test_what_the_table_does_not_list_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="complete is not allowed in stopping"):
        advance(RECEIVER, ReceiverState.STOPPING, ReceiverEvent.COMPLETE)


@pytest.mark.parametrize(
    ("table", "terminal"),
    [(RECEIVER, {ReceiverState.DELIVERED, ReceiverState.RELEASED}), (SENDER, {SenderState.CLOSED})],
    ids=["receiver", "sender"],
)
def test_every_state_is_reached_and_every_one_but_the_last_can_be_left(table: object, terminal: set[object]) -> None:
    first = next(iter(table))[0]
    states = set(type(first))
    assert {target for (source, _), target in table.items() if source is not target} | {first} == states
    assert {source for source, _ in table} == states - terminal
