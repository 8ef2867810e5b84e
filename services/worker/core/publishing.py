"""The last word of a reservation in a KV store: Publish, said until Stored is heard. Pure.

A store keeps reserved pages until it hears Publish, or until the writer's mapping ends: were it said once and lost with a
connection that broke for a moment, they would be kept as long as this worker lives. The store answers a call that it does
not know (any more), so a repeat changes nothing.

Owns one `_Word` per reservation, from its first Publish until Stored, or until the store is not connected any more: then
its memory is unmapped here, which is the same news to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.blocks import Publish

REPEAT_MS = 1_000.0


@dataclass(slots=True)
class _Word:
    store: PeerId
    message: Publish
    repeat_at_ms: float


class Publishing:
    """Says Publish, and says it again."""

    def __init__(self) -> None:
        self._words: dict[int, _Word] = {}

    def say(self, store: PeerId, call: int, now_ms: float, *, ok: bool) -> Send:
        """The reservation is over. What was said first counts: it cannot become true, or untrue, later."""
        message = Publish(call=call, ok=ok)
        word = self._words.setdefault(call, _Word(store, message, now_ms + REPEAT_MS))
        return Send(store, word.message)

    def knows(self, store: PeerId, call: int) -> bool:
        """Whether this reservation's last word waits for its answer."""
        word = self._words.get(call)
        return word is not None and word.store == store

    def on_stored(self, store: PeerId, call: int) -> None:
        """The store has answered."""
        if self.knows(store, call):
            del self._words[call]

    def on_tick(self, now_ms: float, connected: Callable[[PeerId], bool]) -> list[Send]:
        """What was not answered for a while is said again; to whom is not connected, nothing more is said."""
        self._words = {call: word for call, word in self._words.items() if connected(word.store)}
        due = [word for word in self._words.values() if now_ms >= word.repeat_at_ms]
        for word in due:
            word.repeat_at_ms = now_ms + REPEAT_MS
        return [Send(word.store, word.message) for word in due]

    def __len__(self) -> int:
        return len(self._words)
