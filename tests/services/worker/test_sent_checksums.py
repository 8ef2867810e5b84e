"""What was copied is known by page until its transfer is over."""

import pytest

from common.ids import Incarnation, PeerId, TransferId
from common.messages.handover import Abort, Commit, KvSent, KvSpan, Stopped
from services.worker.sent_checksums import SentChecksums

DECODE, NAME = PeerId("decode-0@1"), TransferId("t")


def said(*spans: KvSpan) -> KvSent:
    return KvSent(transfer=NAME, epoch=Incarnation(1), spans=spans)


@pytest.fixture
def sent() -> SentChecksums:
    made = SentChecksums()
    made.on_copied(DECODE, NAME, KvSpan(0, 0, 2, 2), (1, 2, 3, 4))  # two blocks of layers 0 and 1
    made.on_copied(DECODE, NAME, KvSpan(0, 2, 1), (5,))
    made.on_copied(DECODE, NAME, KvSpan(1, 2, 1), (6,))
    return made


def test_a_repeat_that_names_other_spans_has_the_checksums_of_the_same_pages(sent: SentChecksums) -> None:
    assert sent.of(said(KvSpan(0, 2, 1))) == ((5,),)
    assert sent.of(said(KvSpan(0, 0, 3), KvSpan(1, 0, 3))) == ((1, 3, 5), (2, 4, 6))
    assert sent.of(said(KvSpan(0, 0, 3, 2))) == ((1, 2, 3, 4, 5, 6),)


def test_with_one_page_unknown_there_are_none(sent: SentChecksums) -> None:
    assert sent.of(said(KvSpan(0, 0, 4))) == ()


def test_of_a_page_that_was_copied_twice_the_later_copy_counts(sent: SentChecksums) -> None:
    sent.on_copied(DECODE, NAME, KvSpan(1, 1, 2), (40, 60))
    sent.on_copied(DECODE, NAME, KvSpan(0, 2, 1), (50,))
    assert sent.of(said(KvSpan(0, 0, 3), KvSpan(1, 0, 3))) == ((1, 3, 50), (2, 40, 60))


@pytest.mark.parametrize("last", [Commit(transfer=NAME), Stopped(transfer=NAME), Abort(transfer=NAME, code="x")])
def test_the_last_word_of_a_transfer_ends_it(sent: SentChecksums, last: Commit | Stopped | Abort) -> None:
    sent.note(last)
    assert sent.of(said(KvSpan(0, 2, 1))) == () and len(sent) == 0


def test_a_peer_takes_its_transfers_with_it(sent: SentChecksums) -> None:
    sent.forget(DECODE)
    assert len(sent) == 0
