"""Laws of the prefill side, one transfer at a time."""

import msgspec
import pytest

from common.errors import ProtocolViolation
from common.ids import Incarnation, PeerId, TransferId
from common.messages.actions import Send
from common.messages.handover import (
    Abort,
    Commit,
    Grant,
    GrantPending,
    GrantRefused,
    GrantRequest,
    HandOver,
    KvSent,
    KvSpan,
    Renew,
    Stop,
    Stopped,
)
from common.messages.requests import Timings
from kvstore.handover.actions import GaveUp, Granted, HandedOver, PostCopy, Release, SenderAction
from kvstore.handover.outgoing import FirstToken, Way
from kvstore.handover.sender import Sender
from tests.kvstore.handover.world import D, request

T, EPOCH = TransferId("t"), Incarnation(7)
GRANT = Grant(transfer=T, epoch=EPOCH, first_block=1, pages=((10, 11), (12, 13)), lease_ms=30_000)
FIRST = FirstToken(token=3, cached_tokens=16, timings=Timings(compute_ms=8.0))
SPANS = (KvSpan(0, 1, 2), KvSpan(1, 1, 2))
BY_LAYER = Way()


def asking(transport: str = "shm", way: Way = BY_LAYER) -> Sender:
    core = Sender(2, repeat_ms=2_000, commit_wait_ms=8_000, renew_ms=5_000)
    assert core.ask(D, request(T, transport), 3, 0.0, 50_000.0, way) == [Send(D, request(T, transport))]
    return core


def filling(transport: str = "shm", way: Way = BY_LAYER) -> Sender:
    core = asking(transport, way)
    assert core.on_message(D, GRANT, 10.0) == [Granted(T, 1)]
    return core


def handing_over(transport: str = "shm", way: Way = BY_LAYER) -> Sender:
    core = filling(transport, way)
    for span in SPANS:
        core.computed(T, span)
        core.copied(T, span, 20.0)
    core.finished(T, FIRST, 30.0)
    return core


def sends(actions: list[SenderAction]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


def test_what_was_computed_before_the_grant_is_copied_when_it_comes() -> None:
    core = asking()
    assert core.computed(T, KvSpan(0, 0, 2)) == []
    assert core.computed(T, KvSpan(1, 0, 1)) == []
    assert core.on_message(D, GRANT, 1.0) == [Granted(T, 1), PostCopy(T, D, KvSpan(0, 1, 1), (10,))]
    assert core.computed(T, KvSpan(1, 1, 2)) == [PostCopy(T, D, KvSpan(1, 1, 2), (12, 13))]


def test_every_copy_is_announced_and_the_last_one_hands_over() -> None:
    core = filling()
    for span in SPANS:
        core.computed(T, span)
    assert core.finished(T, FIRST, 100.0) == []
    assert core.copied(T, SPANS[1], 110.0) == [Send(D, KvSent(transfer=T, epoch=EPOCH, spans=(SPANS[1],)))]
    sent, handover = sends(core.copied(T, SPANS[0], 130.0))
    assert sent == KvSent(transfer=T, epoch=EPOCH, spans=(SPANS[0],))
    timings = Timings(compute_ms=8.0, grant_wait_ms=0.0, transfer_ms=30.0)
    assert handover == HandOver(transfer=T, epoch=EPOCH, first_token=3, cached_tokens=16, timings=timings)


def test_a_grant_that_comes_late_is_told_apart_from_the_transfer() -> None:
    core = asking()
    for span in SPANS:
        core.computed(T, span)
    core.finished(T, FIRST, 100.0)
    core.on_message(D, GRANT, 140.0)
    core.copied(T, SPANS[1], 150.0)
    _, handover = sends(core.copied(T, SPANS[0], 170.0))
    timings = Timings(compute_ms=8.0, grant_wait_ms=40.0, transfer_ms=30.0)
    assert isinstance(handover, HandOver) and handover.timings == timings


def test_commit_releases_the_source_pages() -> None:
    core = handing_over()
    assert core.on_message(D, Commit(transfer=T), 40.0) == [HandedOver(T), Release(T)]
    assert core.open_transfers == []


def test_a_request_whose_blocks_are_all_there_copies_nothing() -> None:
    core = Sender(2)
    core.ask(D, request(T), 3, 0.0, 50_000.0)
    core.computed(T, KvSpan(0, 0, 3))
    core.finished(T, FIRST, 5.0)
    grant = Grant(transfer=T, epoch=EPOCH, first_block=3, pages=((), ()), lease_ms=1)
    granted, handover = core.on_message(D, grant, 9.0)
    assert granted == Granted(T, 3)
    assert isinstance(handover, Send)
    assert isinstance(handover.message, HandOver)
    assert not [m for m in sends(core.on_tick(4_000.0)) if isinstance(m, KvSent) and m.spans]


@pytest.mark.parametrize("end", ["cancel", "stop", "deadline", "dead", "failed copy"])
def test_pages_are_held_until_no_copy_is_in_flight(end: str) -> None:
    core = filling()
    for span in SPANS:
        core.computed(T, span)
    early: list[SenderAction] = []
    match end:
        case "cancel":
            early = core.cancel(T, "cancelled", 20.0)
        case "stop":
            early = core.on_message(D, Stop(transfer=T, code="cancelled"), 20.0)
        case "deadline":
            early = core.on_tick(50_000.0)
        case "dead":
            early = core.on_peer_dead(D)
        case _:
            core.computed(T, KvSpan(0, 1, 1))
            early = core.copied(T, KvSpan(0, 1, 1), 20.0, ok=False)
    assert not [action for action in early if isinstance(action, Release)]
    assert not [m for m in sends(early) if isinstance(m, Stopped | Abort)]
    assert len([action for action in early if isinstance(action, GaveUp)]) == (end != "cancel")
    assert core.copied(T, SPANS[0], 21.0) == []
    assert core.computed(T, SPANS[0]) == []
    assert core.finished(T, FIRST, 22.0) == []
    farewell, release = core.copied(T, SPANS[1], 23.0, ok=False)
    assert release == Release(T)
    assert isinstance(farewell, Send)
    assert isinstance(farewell.message, Stopped if end == "stop" else Abort)
    assert core.open_transfers == []


def test_who_keeps_a_closed_transfer_in_its_queue_is_told_that_it_ended() -> None:
    aborted = [Send(D, Abort(transfer=T, code="closed"))]
    assert Sender(2).on_message(D, GrantPending(transfer=T), 0.0) == aborted


def test_a_stop_for_a_closed_transfer_is_acknowledged_and_a_late_grant_returned() -> None:
    core = Sender(2)
    assert core.on_message(D, Stop(transfer=T, code="x"), 0.0) == [Send(D, Stopped(transfer=T))]
    assert core.on_message(D, GRANT, 0.0) == [Send(D, Abort(transfer=T, code="closed"))]
    assert core.on_message(D, Commit(transfer=T), 0.0) == []


def test_a_stop_from_a_stranger_stops_nothing() -> None:
    core, stranger = filling(), PeerId("decode@2")
    core.on_message(stranger, Stop(transfer=T, code="x"), 11.0)
    assert core.open_transfers == [T]
    assert core.on_message(stranger, Commit(transfer=T), 11.0) == []


def test_a_refusal_ends_the_transfer_with_the_receivers_own_words() -> None:
    refused = GrantRefused(transfer=T, code="out_of_pages", text="none left", retryable=True)
    assert asking().on_message(D, refused, 5.0) == [
        GaveUp(T, "grant", "out_of_pages", "none left", True),
        Release(T),
    ]


def test_a_refusal_that_comes_after_the_grant_changes_nothing() -> None:
    """A cancelled request that is asked for again is refused, while its Stop is on the way: Stopped is still owed."""
    refused = GrantRefused(transfer=T, code="cancelled", text="the request was cancelled", retryable=False)
    core = filling()
    core.computed(T, SPANS[0])
    assert core.on_message(D, refused, 11.0) == []
    core.on_message(D, Stop(transfer=T, code="cancelled"), 12.0)
    assert core.on_message(D, refused, 13.0) == []
    assert core.copied(T, SPANS[0], 14.0) == [Send(D, Stopped(transfer=T)), Release(T)]


def test_what_has_ended_and_still_writes_renews_its_lease() -> None:
    """Its farewell comes after the last copy; until then the decode worker waits for it, and is told so."""
    core = filling()
    core.computed(T, SPANS[0])
    core.cancel(T, "cancelled", 20.0)
    assert core.on_tick(5_010.0) == [Send(D, Renew(transfers=(T,)))]
    assert core.copied(T, SPANS[0], 5_020.0) == [Send(D, Abort(transfer=T, code="cancelled")), Release(T)]


def test_a_grant_of_another_shape_is_refused() -> None:
    for pages in (((1, 2),), ((1,), (2,)), ((1, 2), (3,))):
        bad = Grant(transfer=T, epoch=EPOCH, first_block=1, pages=pages, lease_ms=1)
        gave_up, abort, release = asking().on_message(D, bad, 1.0)
        assert isinstance(gave_up, GaveUp)
        assert (gave_up.code, abort, release) == (
            "protocol_violation",
            Send(D, Abort(transfer=T, code="protocol_violation")),
            Release(T),
        )


def test_a_lost_request_is_repeated_with_the_time_that_is_left() -> None:
    core = asking()
    assert core.on_tick(1_999.0) == []
    (repeated,) = sends(core.on_tick(2_000.0))
    assert repeated == request(T, timeout_ms=48_000)


def test_who_does_not_answer_five_repeats_in_a_row_has_failed() -> None:
    core = asking()
    for number in range(1, 6):
        assert len(sends(core.on_tick(2_000.0 * number))) == 1
    gave_up, abort, release = core.on_tick(12_000.0)
    assert isinstance(gave_up, GaveUp)
    assert (gave_up.phase, gave_up.code, gave_up.retryable) == ("grant", "peer_failed", True)
    assert gave_up.unanswered and f"decode worker {D} did not answer for 12 s" in gave_up.text
    assert (abort, release) == (Send(D, Abort(transfer=T, code="peer_failed")), Release(T))


def test_who_says_that_the_request_is_in_its_queue_is_asked_until_the_deadline() -> None:
    core = asking()
    for number in range(1, 25):
        assert [type(message) for message in sends(core.on_tick(2_000.0 * number))] == [GrantRequest]
        if number % 5 == 0:
            assert core.on_message(D, GrantPending(transfer=T), 2_000.0 * number + 1.0) == []


def test_time_in_which_the_sender_itself_was_stopped_is_no_silence_of_the_receiver() -> None:
    core = asking()
    assert [type(message) for message in sends(core.on_tick(49_000.0))] == [GrantRequest]
    assert core.on_message(D, GRANT, 49_001.0) == [Granted(T, 1)]


def test_a_grant_that_never_comes_ends_with_the_requests_deadline() -> None:
    core = asking()
    core.on_message(D, GrantPending(transfer=T), 49_000.0)
    gave_up, abort, release = core.on_tick(50_000.0)
    assert isinstance(gave_up, GaveUp)
    assert (gave_up.phase, gave_up.code, gave_up.retryable) == ("grant", "deadline_exceeded", False)
    assert (abort, release) == (Send(D, Abort(transfer=T, code="deadline_exceeded")), Release(T))


def test_over_shared_memory_a_repeat_announces_again_but_never_writes_again() -> None:
    core = handing_over()
    repeated = core.on_tick(2_030.0)
    assert [type(message) for message in sends(repeated)] == [KvSent, HandOver]
    assert sends(repeated)[0] == KvSent(transfer=T, epoch=EPOCH, spans=SPANS)
    assert not [action for action in repeated if isinstance(action, PostCopy)]


def test_over_tcp_a_repeat_sends_the_payloads_again_and_waits_for_them_before_releasing() -> None:
    core = handing_over("tcp")
    repeated = core.on_tick(2_030.0)
    assert [action.span for action in repeated if isinstance(action, PostCopy)] == list(SPANS)
    assert core.on_message(D, Commit(transfer=T), 2_040.0) == [HandedOver(T)]
    assert core.copied(T, SPANS[0], 2_041.0) == []
    assert core.copied(T, SPANS[1], 2_042.0) == [Release(T)]


def test_a_stop_after_the_commit_is_answered_when_the_last_copy_has_ended() -> None:
    core = handing_over("tcp")
    core.on_tick(2_030.0)
    core.on_message(D, Commit(transfer=T), 2_040.0)
    assert core.on_message(D, Stop(transfer=T, code="closed"), 2_041.0) == []
    assert core.copied(T, SPANS[0], 2_042.0) == []
    assert core.copied(T, SPANS[1], 2_043.0) == [Send(D, Stopped(transfer=T)), Release(T)]


def test_pages_that_are_used_again_are_never_sent_again() -> None:
    core = handing_over("tcp", Way(pages_last=False))
    assert [type(message) for message in sends(core.on_tick(2_030.0))] == [HandOver]
    assert core.on_message(D, Commit(transfer=T), 2_040.0) == [HandedOver(T), Release(T)]


def test_a_commit_that_never_comes_is_the_receivers_failure() -> None:
    core = handing_over()
    gave_up, *_, release = core.on_tick(8_030.0)
    assert isinstance(gave_up, GaveUp)
    assert (gave_up.phase, gave_up.code, gave_up.retryable) == ("transfer", "peer_failed", True)
    assert release == Release(T)


def test_leases_are_renewed_while_pages_are_granted_and_not_after() -> None:
    core = filling()
    assert core.on_tick(5_010.0) == [Send(D, Renew(transfers=(T,)))]
    assert core.on_tick(5_011.0) == []
    core.cancel(T, "cancelled", 6_000.0)
    assert core.on_tick(10_010.0) == []


def test_a_short_lease_is_renewed_in_time_and_so_are_longer_ones_beside_it() -> None:
    core, short = filling(), TransferId("short")
    core.ask(D, request(short), 3, 100.0, 60_000.0)
    core.on_message(D, msgspec.structs.replace(GRANT, transfer=short, lease_ms=3_000), 200.0)
    both = [Send(D, Renew(transfers=(T, short)))]
    assert core.on_tick(1_199.0) == []
    assert core.on_tick(1_200.0) == both
    assert core.on_tick(2_200.0) == both


def test_our_own_mistakes_are_errors() -> None:
    core = filling()
    with pytest.raises(ValueError, match="asked for already"):
        core.ask(D, request(T), 3, 0.0, 1.0)
    with pytest.raises(ValueError, match="no copy in flight"):
        core.copied(T, SPANS[0], 0.0)
    with pytest.raises(ValueError, match="lies outside"):
        core.computed(T, KvSpan(0, 1, 9))
    with pytest.raises(ValueError, match="never computed"):
        core.finished(T, FIRST, 0.0)


def test_messages_that_never_belong_here_are_violations() -> None:
    with pytest.raises(ProtocolViolation, match="prefill worker got"):
        asking().on_message(D, Stopped(transfer=T), 0.0)
