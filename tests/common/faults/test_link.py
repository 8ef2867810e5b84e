"""Processes joined in virtual time: what arrives when, and what the log says of it."""

from common.faults.link import Parcel, ScriptedLink
from common.faults.rules import parse_rules
from common.ids import PeerId, TransferId
from common.messages.handover import Commit

A, B = PeerId("prefill-0@1"), PeerId("decode-0@2")


def commit(number: int, sender: PeerId = B, receiver: PeerId = A) -> Parcel:
    return Parcel(sender, receiver, Commit(transfer=TransferId(str(number))))


def numbers(parcels: list[Parcel]) -> list[str]:
    return [parcel.message.transfer for parcel in parcels if isinstance(parcel.message, Commit)]


def arrivals(text: str, n: int = 4) -> list[str]:
    """Of messages sent at 0, 1, 2 ... ms, with the time at which each was there."""
    link = ScriptedLink(parse_rules(text))
    found: list[str] = []
    for now_ms in range(1000):
        if now_ms < n:
            link.send(commit(now_ms), now_ms)
        found += [f"{number}@{now_ms}" for number in numbers(link.take(now_ms))]
    assert link.due_ms is None
    return found


def test_without_faults_all_arrives_in_order_at_once() -> None:
    assert arrivals("") == ["0@0", "1@1", "2@2", "3@3"]


def test_a_dropped_message_does_not_arrive() -> None:
    assert arrivals("commit:drop side=sent after=1 times=1") == ["0@0", "2@2", "3@3"]
    assert arrivals("prefill/commit:drop after=1 times=1") == ["0@0", "2@2", "3@3"]


def test_what_follows_a_late_message_is_late_too() -> None:
    assert arrivals("decode/commit:delay ms=10 times=1") == ["0@10", "1@10", "2@10", "3@10"]


def test_reordered_messages_change_places_and_the_last_waits_no_longer_than_it_must() -> None:
    assert arrivals("decode/commit:reorder after=1 times=1") == ["0@0", "2@2", "1@2", "3@3"]
    assert arrivals("decode/commit:reorder after=3 ms=20") == ["0@0", "1@1", "2@2", "3@23"]


def test_who_changes_places_does_not_overtake_what_was_late_before() -> None:
    assert arrivals("decode/commit:delay ms=10 times=1;decode/commit:reorder after=1 ms=2", 2) == ["0@10", "1@12"]


def test_a_message_comes_twice() -> None:
    assert arrivals("decode/commit:duplicate after=3") == ["0@0", "1@1", "2@2", "3@3", "3@3"]


def test_a_corrupt_message_without_kv_does_not_arrive_and_with_kv_it_does() -> None:
    assert arrivals("decode/commit:corrupt times=3") == ["3@3"]


def test_a_sender_is_told_that_it_cannot_send() -> None:
    link = ScriptedLink(parse_rules("commit:fail side=sent times=1"))
    assert [link.send(commit(n), 0.0) for n in range(2)] == [False, True]
    assert numbers(link.take(0.0)) == ["1"]


def test_the_dead_neither_send_nor_hear() -> None:
    link = ScriptedLink(parse_rules("decode/commit:kill after=1"))
    for number in range(3):
        link.send(commit(number), 0.0)
    link.send(commit(9, A, B), 0.0)
    assert numbers(link.take(1.0)) == ["0"]
    assert link.dead == {B}


def test_messages_to_the_stopped_wait_until_it_goes_on() -> None:
    link = ScriptedLink(parse_rules("prefill/commit:stop times=1"))
    link.send(commit(0), 0.0)
    link.send(commit(1), 0.0)
    assert link.take(1.0) == []
    assert link.stopped == {A}
    link.stopped.clear()
    assert numbers(link.take(2.0)) == ["0", "1"]


def test_the_stopped_hear_nothing_that_comes_later() -> None:
    link = ScriptedLink(parse_rules("prefill/commit:stop times=1;prefill/commit:drop after=1"))
    for now_ms in (0.0, 1.0):
        link.send(commit(0), now_ms)
        link.take(now_ms)
    assert [event.what for event in link.log] == ["stop"]
    link.stopped.clear()
    assert numbers(link.take(2.0)) == ["0"]
    assert [event.what for event in link.log] == ["stop", "drop", "arrived"]


def test_one_seed_gives_one_story() -> None:
    def story(seed: int) -> list[str]:
        link = ScriptedLink(parse_rules(f"commit:drop share=0.3 seed={seed};commit:delay ms=7 share=0.3 seed={seed}"))
        for number in range(60):
            link.send(commit(number), float(number))
            link.take(float(number))
        return [str(event) for event in link.log]

    assert story(3) == story(3) != story(4)
