"""Nothing is heard before it is known to be right, nobody's mismatch is nobody's, and a span that is sent again counts anew."""

from collections.abc import Sequence

import pytest

from common.errors import ProtocolViolation
from common.ids import Incarnation, PeerId, TransferId
from common.log import Log
from common.messages.blocks import Found
from common.messages.handover import Grant, HandOver, KvSent, KvSpan, Renew
from common.net.sockets import Payload
from services.worker.checksum_thread import ChecksumsMade, Pages, Payloads
from services.worker.kv_verifier import Accuse, Corrupt, Hear, KvVerifier, Tell, Verdict

SENDER, OTHER, HOLDER = PeerId("prefill@1"), PeerId("prefill@2"), PeerId("kvstore@1")
T, EPOCH = TransferId("prefill@1/1"), Incarnation(7)
GRANT = Grant(transfer=T, epoch=EPOCH, first_block=2, pages=((10, 11), (20, 21)), lease_ms=1000)
HANDOVER = HandOver(transfer=T, epoch=EPOCH, first_token=5)


class Setting:
    """A verifier whose pages are what the test says, read when the test says."""

    def __init__(self) -> None:
        self.open = True
        self.there = {10: 1, 11: 2, 20: 3, 21: 4}
        self.posted: list[tuple[int, Pages | Payloads]] = []
        self.payloads = False
        self.ms = 0.0
        self.verifier = KvVerifier(lambda *job: self.posted.append(job), self, self.fill, 2, Log(), self)

    def now_ms(self) -> float:
        return self.ms

    def wants_payloads(self, transfer: TransferId) -> bool:
        return self.payloads

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        return GRANT if self.open and (transfer, sender) == (T, SENDER) else None

    def fill(self, pages: Sequence[int], payload: Payload) -> None:
        """A page has one byte, which is its own checksum."""
        self.there.update(zip(pages, bytes(payload), strict=True))

    def hear(self, message: KvSent | HandOver | Found, payloads: Sequence[bytes] = (), peer: PeerId = SENDER) -> bool:
        return self.verifier.holds(peer, message, payloads)

    def read(self, *sums: int, problem: str = "") -> list[Verdict]:
        """The oldest job ends: with these checksums, or those of the pages as they are now."""
        ticket, work = self.posted.pop(0)
        if not sums and isinstance(work, Pages):
            sums = tuple(self.there[page] for page in work.pages)
        return self.verifier.on_made(ChecksumsMade(ticket, sums, problem))

    @property
    def held(self) -> float:
        return self.verifier.gauges()["kv_checks_open"]

    def mismatches(self) -> float:
        counters = self.verifier.counters()
        return sum(n for name, n in counters.items() if name.startswith("kv_mismatches_total"))


@pytest.fixture
def at() -> Setting:
    return Setting()


def sent(
    *sums: int, layer: int = 0, n_blocks: int = 2, n_layers: int = 1, first_block: int = 2, serial: int = 0
) -> KvSent:
    span = KvSpan(layer, first_block, n_blocks, n_layers)
    return KvSent(transfer=T, epoch=EPOCH, spans=(span,), checksums=(sums,) if sums else (), serial=serial)


def test_what_is_right_is_heard_once_it_was_read(at: Setting) -> None:
    message = sent(1, 3, 2, 4, n_layers=2)
    assert at.hear(message) and at.posted[0][1] == Pages((10, 20, 11, 21))
    assert at.read() == [Hear(SENDER, message, ())]
    assert not at.hear(HANDOVER) and at.held == 0
    assert at.verifier.counters()["kv_checked_pages_total"] == 4 and at.mismatches() == 0


def test_the_hand_over_waits_for_what_is_being_read(at: Setting) -> None:
    first, second = sent(1, 2), sent(3, 4, layer=1)
    assert at.hear(first) and at.hear(second) and at.hear(HANDOVER)
    assert at.read() == [Hear(SENDER, first, ())]
    assert at.read() == [Hear(SENDER, second, ()), Hear(SENDER, HANDOVER, ())]
    assert at.held == 0


def test_a_wrong_page_ends_the_transfer_once_nobody_writes_any_more(at: Setting) -> None:
    assert at.hear(sent(1, 9)) and at.read() == []
    assert at.hear(HANDOVER)
    verdicts = at.read()
    assert [type(one) for one in verdicts] == [Corrupt] and "(0, 3)" in verdicts[0].text  # type: ignore[union-attr]
    assert at.mismatches() == 1 and at.held == 0


def test_a_page_that_was_being_written_again_is_condemned_by_nobody(at: Setting) -> None:
    """The second copy is under way when the first one is checked."""
    at.there[11] = 5
    old, new = sent(1, 2), sent(5, first_block=3, n_blocks=1)
    assert at.hear(old) and at.read() == []
    assert at.hear(new) and at.read() == [Hear(SENDER, new, ())]
    assert at.hear(HANDOVER)
    assert at.read() == [Hear(SENDER, old, ()), Hear(SENDER, HANDOVER, ())]
    assert at.mismatches() == 0


def test_of_two_that_cover_a_page_the_newer_counts(at: Setting) -> None:
    old, new = sent(1, 2), sent(1, 9)  # the page is still what the old one says
    assert at.hear(old) and at.hear(new) and at.hear(HANDOVER)
    assert at.read() == [Hear(SENDER, old, ())] and at.read() == []
    assert [type(one) for one in at.read()] == [Corrupt]


def test_what_has_ended_meanwhile_has_no_mismatch(at: Setting) -> None:
    message = sent(9, 9)
    assert at.hear(message)
    at.open = False
    assert at.read() == [Hear(SENDER, message, ())]
    assert at.mismatches() == 0 and at.held == 0


def test_what_is_held_of_a_transfer_goes_with_it(at: Setting) -> None:
    assert at.hear(sent(9, 9)) and at.read() == []
    at.verifier.on_tick()
    assert at.held == 1
    at.open = False
    at.verifier.on_tick()
    assert at.held == 0 and not at.hear(HANDOVER)


def test_a_payload_is_in_its_pages_when_they_are_checked(at: Setting) -> None:
    message, at.payloads = sent(7, 8), True
    assert at.hear(message, [b"\x07\x08"]) and at.there == {10: 7, 11: 8, 20: 3, 21: 4}
    assert at.read() == [Hear(SENDER, message, ())]


@pytest.mark.parametrize(("came", "lies"), [(b"\x01\x03", 3), (b"\x01\x02", 3)], ids=["payload", "copy of it"])
def test_a_wrong_payload_and_a_wrong_copy_of_a_right_one_end_the_transfer(at: Setting, came: bytes, lies: int) -> None:
    at.payloads = True
    assert at.hear(sent(1, 2), [came])
    at.there[11] = lies
    assert at.read() == [] and at.hear(HANDOVER)
    assert [type(one) for one in at.read()] == [Corrupt] and at.mismatches() == 1


def test_a_payload_that_was_gathered_before_its_pages_were_computed_anew_is_condemned_by_nobody(at: Setting) -> None:
    """Its checksums were made behind that; the payload that belongs to them follows."""
    at.payloads = True
    old, new = sent(1, 5), sent(5, first_block=3, n_blocks=1)
    assert at.hear(old, [b"\x01\x02"]) and at.read() == []
    assert at.hear(new, [b"\x05"]) and at.read() == [Hear(SENDER, new, ())]
    assert at.hear(HANDOVER)
    assert at.read() == [Hear(SENDER, old, ()), Hear(SENDER, HANDOVER, ())] and at.mismatches() == 0


def test_frames_that_come_along_with_pages_which_their_sender_writes_are_not_used(at: Setting) -> None:
    assert at.hear(sent(7, 8), [b"\x07\x08"]) and at.there[10] == 1
    assert at.read() == [] and at.hear(HANDOVER)
    assert [type(one) for one in at.read()] == [Corrupt]


def test_the_time_for_which_a_hand_over_is_held_belongs_to_its_transfer(at: Setting) -> None:
    message = sent(1, 2)
    assert at.hear(message) and at.hear(HANDOVER)
    at.ms = 30.0
    assert at.hear(HANDOVER)  # said again
    at.ms = 70.0
    _, heard = at.read()
    assert isinstance(heard, Hear) and isinstance(heard.message, HandOver)
    assert heard.message.timings.transfer_ms == HANDOVER.timings.transfer_ms + 70.0


@pytest.mark.parametrize("payloads", [False, True])
def test_an_older_one_that_comes_late_undoes_and_condemns_nothing(at: Setting, payloads: bool) -> None:
    first, second = sent(1, 2, serial=1), sent(5, first_block=3, n_blocks=1, serial=2)
    at.payloads = payloads
    at.there[11] = 5  # as the writer of the second one left it
    assert at.hear(second, [b"\x05"] if payloads else [])
    assert at.hear(first, [b"\x01\x02"] if payloads else []) and at.there[11] == 5
    assert at.hear(HANDOVER)
    assert at.read() == [Hear(SENDER, second, ())]
    assert at.read() == [Hear(SENDER, first, ()), Hear(SENDER, HANDOVER, ())]
    assert at.mismatches() == 0


def test_pages_that_cannot_be_read_are_not_right(at: Setting) -> None:
    assert at.hear(sent(1, 2)) and at.hear(HANDOVER)
    assert at.read(problem="gone") == []
    assert [type(one) for one in at.read(problem="gone")] == [Corrupt]


def test_what_the_core_must_judge_is_not_held(at: Setting) -> None:
    wrong_epoch = KvSent(transfer=T, epoch=Incarnation(8), spans=(KvSpan(0, 2, 2),), checksums=((1, 2),))
    for message, peer in ((sent(1, 2), OTHER), (sent(1, 2, first_block=0), SENDER), (wrong_epoch, SENDER)):
        assert not at.hear(message, peer=peer)
    assert not at.verifier.holds(SENDER, Renew(transfers=(T,)), ()) and not at.posted


def test_pages_without_checksums_are_heard_and_counted(at: Setting) -> None:
    assert not at.hear(sent()) and not at.hear(Found(call=1, n_blocks=3), [b"", b"", b""])
    assert at.verifier.counters()["kv_unchecked_pages_total"] == 2 + 6


def test_checksums_of_another_shape_are_a_violation(at: Setting) -> None:
    with pytest.raises(ProtocolViolation, match="another shape"):
        at.hear(sent(1, 2, 3))
    with pytest.raises(ProtocolViolation, match="another shape"):
        at.hear(Found(call=1, n_blocks=1, checksums=((1,),)), [b"x"])


def test_of_a_found_run_the_leading_right_blocks_are_found(at: Setting) -> None:
    found = Found(call=1, n_blocks=3, tiers=("host",) * 3, more=True, checksums=((1, 2), (3, 4), (5, 6)))
    frames = [b"a", b"b", b"c"]
    assert at.hear(found, frames, HOLDER)
    heard, accused = at.read(1, 2, 3, 9, 5, 6)
    assert accused == Accuse(HOLDER, 1, (1,))
    assert isinstance(heard, Hear) and isinstance(heard.message, Found)
    assert (heard.message.n_blocks, heard.message.tiers, heard.message.more) == (1, ("host",), False)
    assert heard.payloads == [b"a"] and at.mismatches() == 1


def test_what_names_our_pages_leaves_with_their_checksums(at: Setting) -> None:
    assert at.verifier.seals(HOLDER, Found(call=1, n_blocks=1, pages=((10, 20),)))
    (first,) = at.read()
    assert isinstance(first, Tell) and isinstance(first.message, Found) and first.message.checksums == ((1, 3),)
    assert not at.verifier.seals(HOLDER, Found(call=3, n_blocks=0))


def test_our_own_bug_is_raised(at: Setting) -> None:
    with pytest.raises(ZeroDivisionError):
        at.verifier.on_made(ChecksumsMade(1, (), "", ZeroDivisionError()))
