"""Laws of the decode side, one transfer at a time."""

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
    HandOver,
    KvSent,
    KvSpan,
    Renew,
    Stop,
    Stopped,
)
from kvstore.handover.actions import Asked, Deliver, Fill, GaveUp, Quarantine, Release
from kvstore.handover.receiver import Receiver
from tests.kvstore.handover.world import D, P, request

T, EPOCH, LEASE_MS, UNTOLD_MS = TransferId("t"), Incarnation(7), 30_000, 5_000.0
GRANT = Grant(transfer=T, epoch=EPOCH, first_block=1, pages=((10, 11), (12, 13)), lease_ms=LEASE_MS)
HANDOVER = HandOver(transfer=T, epoch=EPOCH, first_token=3)
COMMITTED = [Deliver(T, HANDOVER), Send(P, Commit(transfer=T))]


def joined() -> Receiver:
    """One that P maps the memory of."""
    core = Receiver(EPOCH, 2, repeat_ms=500, remember_ms=60_000)
    core.on_peer_joined(P)
    return core


def receiver(*, remote: bool = True) -> Receiver:
    core = joined()
    assert core.open(P, GRANT, remote, 0.0) == [Send(P, GRANT)]
    return core


def sent(*spans: tuple[int, ...], epoch: int = EPOCH) -> KvSent:
    return KvSent(transfer=T, epoch=Incarnation(epoch), spans=tuple(KvSpan(*span) for span in spans))


ALL = sent((0, 1, 2), (1, 1, 2))


def test_it_delivers_when_every_block_of_every_layer_and_the_first_token_are_here() -> None:
    core = receiver()
    assert core.on_message(P, sent((0, 1, 1)), 1.0) == []
    assert core.on_message(P, sent((1, 1, 2)), 1.0) == []
    assert core.on_message(P, HANDOVER, 1.0) == []
    assert core.on_message(P, sent((0, 2, 1)), 1.0) == COMMITTED
    assert core.open_transfers == []


def test_repeats_of_one_layer_do_not_stand_for_another() -> None:
    core = receiver()
    core.on_message(P, HANDOVER, 1.0)
    for _ in range(4):
        assert core.on_message(P, sent((0, 1, 2)), 1.0) == []
    assert core.on_message(P, sent((1, 1, 2)), 1.0) == COMMITTED


def test_a_transfer_of_no_blocks_is_complete_with_its_first_token() -> None:
    core = joined()
    core.open(P, Grant(transfer=T, epoch=EPOCH, first_block=4, pages=((), ()), lease_ms=LEASE_MS), True, 0.0)
    assert core.on_message(P, HANDOVER, 1.0) == COMMITTED


def test_content_for_another_incarnation_is_refused_and_changes_nothing() -> None:
    core = receiver()
    for message in (sent((0, 1, 2), (1, 1, 2), epoch=6), HandOver(transfer=T, epoch=Incarnation(6), first_token=9)):
        assert core.on_message(P, message, 1.0) == [Send(P, Stop(transfer=T, code="wrong_epoch"))]
    core.on_message(P, ALL, 1.0)
    assert core.on_message(P, HANDOVER, 1.0) == COMMITTED


def test_blocks_that_were_not_granted_end_the_transfer() -> None:
    for span in (
        *((0, 0, 1), (0, 1, 3), (2, 1, 1), (0, 3, 1), (0, 1, 0), (-1, 1, 1)),
        *((0, 1, 1, 3), (1, 1, 1, 2), (0, 1, 1, 0), (1, 1, 1, -1), (0, 2, -1, -1), (-1, 1, 1, 2)),
    ):
        actions = receiver().on_message(P, sent((0, 1, 2), span), 1.0)
        assert Quarantine(T) in actions
        assert Send(P, Stop(transfer=T, code="protocol_violation")) in actions


def test_another_peer_cannot_touch_a_transfer() -> None:
    core, stranger = receiver(), PeerId("prefill@2")
    core.on_message(P, ALL, 1.0)
    for message in (HANDOVER, Abort(transfer=T, code="x"), Stopped(transfer=T), request(T)):
        assert core.on_message(stranger, message, 1.0) == []
    assert core.on_message(P, HANDOVER, 1.0) == COMMITTED


def test_stopped_pages_stay_in_quarantine_until_the_writer_says_so_however_long() -> None:
    core = receiver()
    stop = Send(P, Stop(transfer=T, code="cancelled"))
    assert core.stop(T, "cancelled", 0.0)[1:] == [Quarantine(T), stop]
    for second in range(1, 200):
        assert core.on_tick(second * 1000.0) == [stop]
    assert core.on_message(P, ALL, 200_000.0) == []
    assert core.on_message(P, HANDOVER, 200_000.0) == []
    assert core.on_message(P, Stopped(transfer=T), 200_001.0) == [Release(T)]
    assert core.on_message(P, Stopped(transfer=T), 200_002.0) == []


@pytest.mark.parametrize("stopping", [False, True])
def test_the_death_of_the_writer_frees_its_pages(stopping: bool) -> None:
    core = receiver()
    if stopping:
        core.stop(T, "cancelled", 0.0)
    actions = core.on_peer_dead(P, 1.0)
    assert actions[-1] == Release(T)
    assert any(isinstance(action, GaveUp) for action in actions) is not stopping
    assert core.open_transfers == []


def test_a_dead_writer_opens_nothing_until_it_joins_again() -> None:
    core = receiver()
    core.on_peer_dead(P, 1.0)
    late = TransferId("late")
    assert core.on_message(P, request(late), 2.0) == []
    assert core.open(P, Grant(transfer=late, epoch=EPOCH, first_block=0, pages=((), ()), lease_ms=9), True, 2.0) == [
        Release(late)
    ]
    core.on_peer_joined(P)
    assert core.on_message(P, request(late), 3.0) == [Asked(P, request(late))]


def test_a_stranger_that_says_it_shares_memory_is_given_none() -> None:
    core, stranger = joined(), PeerId("prefill-9@2")
    for transport in ("shm", "cuda_ipc", "x"):
        assert core.on_message(stranger, request(T, transport), 1.0) == []
    assert core.open(stranger, GRANT, True, 1.0) == [Release(T)]
    assert core.open_transfers == []


def test_a_sender_that_lost_its_mapping_is_served_over_tcp() -> None:
    core = joined()
    core.on_peer_dead(P, 1.0)
    asked = request(T, "tcp")
    assert core.on_message(P, asked, 2.0) == [Asked(P, asked)]
    assert core.open(P, GRANT, False, 3.0) == [Send(P, GRANT)]
    assert [type(action) for action in core.on_message(P, ALL, 4.0)] == [Fill, Fill]
    assert core.on_message(P, HANDOVER, 5.0) == COMMITTED


@pytest.mark.parametrize("granted", [False, True])
def test_the_end_of_a_mapping_leaves_transfers_over_tcp_alone(granted: bool) -> None:
    core = joined()
    core.on_message(P, request(T, "tcp"), 0.0)
    if granted:
        core.open(P, GRANT, False, 0.0)
    assert core.on_peer_dead(P, 1.0) == []
    assert core.open_transfers == [T]


def test_the_end_of_a_mapping_ends_what_waits_to_write_through_it() -> None:
    core = joined()
    core.on_message(P, request(T), 0.0)
    assert [type(action) for action in core.on_peer_dead(P, 1.0)] == [GaveUp]
    assert core.on_message(P, request(T), 2.0) == []


def test_a_silent_writer_keeps_its_pages_in_quarantine() -> None:
    actions = receiver().on_peer_silent(P, 1.0)
    assert Quarantine(T) in actions
    assert Release(T) not in actions


def test_over_tcp_nobody_else_writes_so_a_stop_frees_at_once() -> None:
    core = receiver(remote=False)
    assert core.stop(T, "cancelled", 1.0)[1:] == [Send(P, Stop(transfer=T, code="cancelled")), Release(T)]
    assert core.on_message(P, ALL, 2.0) == [Send(P, Stop(transfer=T, code="closed"))]


def test_over_tcp_each_payload_is_written_into_its_pages_again_if_it_comes_again() -> None:
    core = receiver(remote=False)
    assert core.on_message(P, sent((1, 2, 1)), 1.0) == [Fill(T, KvSpan(1, 2, 1), (13,), 0)]
    both = [Fill(T, KvSpan(1, 2, 1), (13,), 0), Fill(T, KvSpan(0, 1, 2), (10, 11), 1)]
    assert core.on_message(P, sent((1, 2, 1), (0, 1, 2)), 1.0) == both


def test_a_span_of_all_layers_fills_block_by_block_and_counts_for_every_layer() -> None:
    core, span = receiver(remote=False), KvSpan(0, 1, 2, 2)
    message = KvSent(transfer=T, epoch=EPOCH, spans=(span,))
    assert core.on_message(P, message, 1.0) == [Fill(T, span, (10, 12, 11, 13), 0)]
    assert core.on_message(P, HANDOVER, 1.0) == COMMITTED


def test_an_unrenewed_lease_ends_in_a_stop_and_a_renewed_one_does_not() -> None:
    core = receiver()
    assert core.on_message(P, Renew(transfers=(T,)), 20_000.0) == []
    assert core.on_tick(LEASE_MS + 1.0) == []
    assert Quarantine(T) in core.on_tick(20_000.0 + LEASE_MS)


def test_messages_about_a_delivered_transfer_are_answered_with_commit() -> None:
    core = receiver()
    core.on_message(P, ALL, 1.0)
    core.on_message(P, HANDOVER, 1.0)
    for message in (HANDOVER, ALL, request(T), Renew(transfers=(T,))):
        assert core.on_message(P, message, 2.0) == [Send(P, Commit(transfer=T))]
    assert core.on_message(P, Abort(transfer=T, code="no_commit"), 3.0) == []
    core.on_tick(61_002.0)
    assert core.on_message(P, HANDOVER, 61_003.0) == [Send(P, Stop(transfer=T, code="closed"))]


def test_a_lost_grant_is_sent_again() -> None:
    assert receiver().on_message(P, request(T), 5.0) == [Send(P, GRANT)]


def test_a_waiting_request_is_announced_once_and_can_be_refused() -> None:
    core = joined()
    assert core.on_message(P, request(T), 0.0) == [Asked(P, request(T))]
    assert core.on_message(P, request(T), 1.0) == [Send(P, GrantPending(transfer=T))]
    refusal = GrantRefused(transfer=T, code="out_of_pages", text="none left", retryable=True)
    assert core.refuse(T, "out_of_pages", "none left", True, 2.0) == [Send(P, refusal)]
    assert core.open_transfers == []


def test_only_whose_request_waits_is_told_that_it_does() -> None:
    core, stranger = joined(), PeerId("prefill@2")
    core.on_peer_joined(stranger)
    core.on_message(P, request(T), 0.0)
    assert core.on_message(stranger, request(T), 1.0) == []


def test_a_waiting_request_ends_with_its_own_deadline() -> None:
    core = joined()
    core.on_message(P, request(T, timeout_ms=900), 100.0)
    assert core.on_tick(999.0) == []
    answer, gave_up = core.on_tick(1_000.0)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, GrantRefused)
    assert isinstance(gave_up, GaveUp)
    assert (gave_up.phase, gave_up.code, gave_up.retryable) == ("grant", "deadline_exceeded", False)


def test_pages_for_a_withdrawn_request_come_straight_back() -> None:
    core = joined()
    core.on_message(P, request(T), 0.0)
    assert [type(action) for action in core.on_message(P, Abort(transfer=T, code="cancelled"), 1.0)] == [GaveUp]
    assert core.open(P, GRANT, True, 2.0) == [Send(P, Stop(transfer=T, code="closed")), Release(T)]
    assert core.open_transfers == []


def test_messages_that_never_belong_here_are_violations() -> None:
    for message in (GRANT, Commit(transfer=T), Stop(transfer=T, code="x")):
        with pytest.raises(ProtocolViolation, match="decode worker got"):
            receiver().on_message(D, message, 0.0)


@pytest.mark.parametrize("stopped", [False, True])
def test_pages_that_no_writer_was_told_of_are_free_after_seconds(stopped: bool) -> None:
    core = receiver()
    if stopped:
        core.stop(T, "cancelled", 0.0)
    core.on_unsent(T, 0.0)
    assert Release(T) not in core.on_tick(499.0 if stopped else UNTOLD_MS - 1.0), "it may ask again"
    ended = core.on_tick(500.0 if stopped else UNTOLD_MS)
    assert ended[-1] == Release(T)
    gave_up = [(a.phase, a.code, a.retryable) for a in ended if isinstance(a, GaveUp)]
    assert gave_up == ([] if stopped else [("grant", "peer_failed", True)])
    core.check()
    assert core.on_message(P, request(T), 2.0) == [Send(P, Stop(transfer=T, code="closed"))]


def test_a_repeat_that_could_not_be_sent_frees_nothing_that_its_writer_may_know() -> None:
    core = receiver()
    core.on_message(P, request(T), 1.0)
    core.on_unsent(T, 1.0)
    assert core.on_tick(UNTOLD_MS + 2.0) == []
    core.on_message(P, ALL, UNTOLD_MS + 3.0)
    assert core.on_message(P, HANDOVER, UNTOLD_MS + 3.0) == COMMITTED


def test_a_grant_that_leaves_at_the_second_attempt_counts() -> None:
    core = receiver()
    core.on_unsent(T, 0.0)
    assert core.on_message(P, request(T), 2_000.0) == [Send(P, GRANT)]
    assert core.on_tick(LEASE_MS + 1_999.0) == [], "its lease begins when it may be heard"
    assert Quarantine(T) in core.on_tick(LEASE_MS + 2_000.0), "its writer may write"
    core.on_unsent(TransferId("unknown"), 0.0)


def test_a_sender_that_asks_again_and_again_and_cannot_be_told_keeps_its_pages_no_longer_for_that() -> None:
    core = receiver()
    for asked_ms in (0.0, 2_000.0, 4_000.0):
        core.on_unsent(T, asked_ms)
        assert core.on_tick(asked_ms + 500.0) == []
        if asked_ms < 4_000.0:
            core.on_message(P, request(T), asked_ms + 2_000.0)
    assert core.on_tick(UNTOLD_MS)[-1] == Release(T)


def test_a_grant_that_was_never_said_cannot_come_back() -> None:
    core = receiver()
    core.on_unsent(T, 0.0)
    with pytest.raises(ValueError, match="never said"):
        core.on_unsent(T, 0.0)
