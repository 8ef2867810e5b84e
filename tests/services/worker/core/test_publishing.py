"""Laws of a reservation's last word: it is said until it is heard, it never changes, and it does not outlive its store."""

from collections.abc import Callable

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.blocks import Publish
from services.worker.core.publishing import REPEAT_MS, Publishing

STORE, OTHER = PeerId("kvstore-0@1"), PeerId("kvstore-0@2")


def connected(*stores: PeerId) -> Callable[[PeerId], bool]:
    return lambda store: store in stores


def test_what_was_said_first_is_said_again_whatever_is_known_later() -> None:
    words = Publishing()
    said = Send(STORE, Publish(call=1, ok=False))
    assert words.say(STORE, 1, 0.0, ok=False) == said
    assert words.say(STORE, 1, 5.0, ok=True) == said
    assert words.on_tick(REPEAT_MS - 1.0, connected(STORE)) == []
    assert words.on_tick(REPEAT_MS, connected(STORE)) == [said]
    assert words.on_tick(REPEAT_MS + 1.0, connected(STORE)) == []


def test_only_the_store_that_was_told_ends_the_word() -> None:
    words = Publishing()
    words.say(STORE, 1, 0.0, ok=True)
    words.on_stored(OTHER, 1)
    assert words.knows(STORE, 1) and not words.knows(OTHER, 1)
    words.on_stored(STORE, 1)
    assert len(words) == 0 and words.on_tick(REPEAT_MS, connected(STORE)) == []


def test_to_a_store_that_is_gone_nothing_more_is_said() -> None:
    words = Publishing()
    words.say(STORE, 1, 0.0, ok=True)
    assert words.on_tick(REPEAT_MS, connected(OTHER)) == []
    assert len(words) == 0
