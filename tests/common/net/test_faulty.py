"""Two real exchanges, one of which meets its faults. Its clock is set by hand: nothing here depends on how long it takes."""

from collections.abc import Iterator

import pytest

from common.ids import Incarnation, PeerId, TransferId, WorkerId
from common.log import Log
from common.messages.handover import Commit, KvSent, KvSpan
from common.messages.liveness import PageCounts, Ping, QueueCounts, Report
from common.net.fault_kit import FaultKit
from common.net.faulty import FaultyExchange
from common.net.sockets import Exchange, Received
from tests.common.net.test_fault_kit import Hand

A, B = PeerId("prefill-0@1"), PeerId("decode-0@2")
END = Commit(transfer=TransferId("end"))


class Pair:
    """`a` has faults and dials `b`, which has none."""

    def __init__(self, rules: str) -> None:
        self.clock = Hand()
        self.b = Exchange(B, "tcp://127.0.0.1:0")
        self.a = FaultyExchange(A, None, FaultKit(rules, A, Log()), clock=self.clock)
        self.a.dial(B, self.b.endpoint)

    def send(self, *numbers: int) -> list[bool]:
        return [self.a.send(B, Commit(transfer=TransferId(str(number)))) for number in numbers]

    def heard_by_b(self) -> list[str]:
        """All that `a` has let out: a last message, past its faults, says that nothing follows."""
        assert Exchange.send(self.a, B, END)
        return [name for name in _until_end(self.b) if name != "end"]

    def close(self) -> None:
        self.a.close()
        self.b.close()


def _until_end(exchange: Exchange) -> list[str]:
    found: list[str] = []
    while "end" not in found:
        received = exchange.receive(10_000)
        assert received, "nothing arrived in 10 s"
        found += [_name(one) for one in received]
    return found


def _name(received: Received) -> str:
    message = received[1]
    return message.transfer if isinstance(message, Commit) else type(message).__name__


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def rules(text: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", [text], indirect=True, ids=[text.replace(" ", ",")])


@rules("commit:drop side=sent after=1 times=1")
def test_a_dropped_message_is_sent_and_does_not_arrive(pair: Pair) -> None:
    assert pair.send(0, 1, 2) == [True] * 3
    assert pair.heard_by_b() == ["0", "2"]


@rules("commit:fail side=sent times=1")
def test_a_message_that_fails_is_told_to_its_sender(pair: Pair) -> None:
    assert pair.send(0, 1) == [False, True]
    assert pair.heard_by_b() == ["1"]


@rules("commit:delay ms=50 side=sent times=1")
def test_a_late_message_blocks_nobody_and_keeps_its_place(pair: Pair) -> None:
    pair.send(0, 1)
    assert pair.a.send(B, Ping(sequence=1))  # a sign of life is not held up
    assert pair.heard_by_b() == ["Ping"]
    pair.clock.ms = 50.0
    pair.a.receive(0)
    assert pair.heard_by_b() == ["0", "1"]


@rules("commit:reorder times=1;commit:duplicate after=2 times=1")
def test_messages_change_places_and_come_twice(pair: Pair) -> None:
    pair.send(0, 1, 2)
    assert pair.heard_by_b() == ["1", "0", "2", "2"]


@rules("commit:corrupt times=1")
def test_a_corrupt_message_does_not_parse(pair: Pair) -> None:
    pair.send(0, 1)
    assert pair.heard_by_b() == ["1"]
    assert pair.b.bad_frames == 1


@rules("transfer:corrupt")
def test_of_kv_one_byte_is_another_and_the_message_is_whole(pair: Pair) -> None:
    sent = KvSent(transfer=TransferId("t"), epoch=Incarnation(1), spans=(KvSpan(0, 0, 1),))
    pair.a.send(B, sent, [b"\0" * 9])
    ((_, message, payloads),) = pair.b.receive(10_000)
    assert message == sent
    assert sorted(bytes(payloads[0])) == [0] * 8 + [255]


@rules("commit:cut after=1 times=1")
def test_a_cut_is_silence_both_ways(pair: Pair) -> None:
    pair.send(0, 1, 2)
    assert pair.heard_by_b() == ["0"]
    assert pair.b.send(A, Commit(transfer=TransferId("back")))
    assert pair.b.send(A, Ping(sequence=1))
    assert [_name(one) for one in pair.a.receive(10_000) or pair.a.receive(10_000)] == ["Ping"]


@rules("commit:delay ms=50 side=heard times=1")
def test_what_is_heard_late_is_given_when_it_is_due(pair: Pair) -> None:
    pair.send(9)
    pair.heard_by_b()
    assert pair.b.send(A, Commit(transfer=TransferId("0")))
    assert pair.b.send(A, Ping(sequence=1))
    assert [_name(one) for one in pair.a.receive(10_000) or pair.a.receive(10_000)] == ["Ping"]
    pair.clock.ms = 50.0
    assert [_name(one) for one in pair.a.receive(0)] == ["0"]


@rules("commit:drop side=sent")
def test_a_report_says_that_there_are_faults(pair: Pair) -> None:
    pair.send(0)
    report = Report(
        worker=WorkerId("prefill-0"),
        role="prefill",
        incarnation=Incarnation(1),
        sequence=1,
        pages=PageCounts(),
        queue=QueueCounts(),
    )
    pair.a.send(B, report)
    ((_, told, _),) = pair.b.receive(10_000)
    assert isinstance(told, Report)
    assert told.gauges["faults_on"] == 1.0
    assert told.counters == {"faults_injected_total{point=commit,kind=drop}": 1.0} == pair.a.counters()
