"""What a conversation's next prompt consists of: the opening, what turns added, and the real answers between them. Pure."""

from dataclasses import dataclass
from random import Random
from typing import Any  # Any: JSON of a chat message

from loadgen.workload.plan import Conversation, Turn

_FIRST_ID, _LAST_ID = 10, 250


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back of one turn, in whatever form the server gave it."""

    text: str
    token_ids: tuple[int, ...] | None
    """None: the server does not tell them."""
    n_tokens: int


class History:
    """Owns one conversation's prompt so far. `ask`, then `hear`, turn by turn."""

    def __init__(self, conversation: Conversation, endpoint: str) -> None:
        """`endpoint`: `chat` makes messages of text, `completions` one prompt of text or token ids."""
        self._index = conversation.index
        self._ids: list[int] = []
        self._text = ""
        self._messages: list[dict[str, Any]] = []
        self._chat = endpoint == "chat"
        opening = conversation.opening
        if self._chat and opening:
            self._messages.append({"role": "system", "content": opening})
        elif isinstance(opening, str):
            self._text = opening
        else:
            self._ids.extend(opening)

    def ask(self, turn: Turn) -> dict[str, Any]:
        """Add what the turn adds; the field of a request body that holds the whole prompt."""
        if self._chat:
            self._messages.append({"role": "user", "content": turn.added})
            return {"messages": self._messages}
        if isinstance(turn.added, str):
            self._text = f"{self._text} {turn.added}" if self._text else turn.added
            return {"prompt": self._text}
        self._ids.extend(turn.added)
        return {"prompt": self._ids}

    @property
    def input_tokens(self) -> int | None:
        """Length of the prompt just asked; None for text, which only the server can count."""
        return len(self._ids) if self._ids else None

    def hear(self, answer: Answer) -> bool:
        """Add the answer. False if random ids had to stand for it, because nobody told its own."""
        if self._chat:
            self._messages.append({"role": "assistant", "content": answer.text})
        elif not self._ids:
            self._text += answer.text
        elif answer.token_ids is not None:
            self._ids.extend(answer.token_ids)
        else:
            chance = Random(f"{self._index}/{len(self._ids)}")
            self._ids.extend(chance.choices(range(_FIRST_ID, _LAST_ID + 1), k=answer.n_tokens))
            return False
        return True
