"""Spans as payloads: whole, in order, and never somewhere else."""

import numpy as np
import pytest

from common.errors import PeerFailed, ProtocolViolation
from common.ids import Incarnation, TransferId
from common.messages.handover import KvSent, KvSpan
from kvstore.transport.tcp import TcpChannel, check_payloads, write_payload

PAGE_BYTES = 4096
SPAN = KvSpan(0, 4, 3)


def test_a_span_arrives_in_the_granted_pages() -> None:
    source = np.random.default_rng(1).integers(0, 256, (8, PAGE_BYTES), np.uint8)
    target = np.zeros((8, PAGE_BYTES), np.uint8)
    copied = TcpChannel(source).copy(SPAN, [5, 1, 2], [7, 0, 3])
    assert copied.payload is not None
    assert (copied.n_copies, copied.n_bytes) == (2, 3 * PAGE_BYTES)
    write_payload(target, [7, 0, 3], memoryview(copied.payload))
    assert np.array_equal(target[[7, 0, 3]], source[[5, 1, 2]])
    assert not target[[1, 2, 4, 5, 6]].any()


def test_a_payload_of_another_length_is_refused_with_nothing_written() -> None:
    target = np.zeros((8, PAGE_BYTES), np.uint8)
    for n_bytes in (0, PAGE_BYTES, 3 * PAGE_BYTES - 1, 4 * PAGE_BYTES):
        with pytest.raises(ProtocolViolation, match="payload"):
            write_payload(target, [0, 1, 2], b"\1" * n_bytes)
    assert not target.any()


def test_announced_spans_and_payloads_must_agree_one_by_one() -> None:
    message = KvSent(transfer=TransferId("t"), epoch=Incarnation(1), spans=(SPAN, KvSpan(1, 4, 1)))
    check_payloads(message, [bytes(3 * PAGE_BYTES), bytes(PAGE_BYTES)], PAGE_BYTES)
    both = KvSent(transfer=TransferId("t"), epoch=Incarnation(1), spans=(KvSpan(1, 4, 3, 2),))
    check_payloads(both, [bytes(6 * PAGE_BYTES)], PAGE_BYTES)
    for payloads in ([], [bytes(3 * PAGE_BYTES)], [bytes(PAGE_BYTES), bytes(3 * PAGE_BYTES)]):
        with pytest.raises(ProtocolViolation, match="transfer t"):
            check_payloads(message, payloads, PAGE_BYTES)


def test_a_grant_of_another_length_is_the_peers_failure() -> None:
    with pytest.raises(PeerFailed, match="2 pages for 1"):
        TcpChannel(np.zeros((4, PAGE_BYTES), np.uint8)).copy(SPAN, [0, 1], [0])
