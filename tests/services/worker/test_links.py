"""Channels belong to the attempt that is wanted now; a measurement never stands between a channel and its use."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest

from common.clock import Clock
from common.errors import KvCorrupt, PeerFailed
from common.ids import Incarnation, PeerId, WorkerId
from common.kv_layout import KvLayout
from common.messages.base import Message
from common.messages.handover import Probe
from common.messages.liveness import Member, TransportReport
from common.net.sockets import Exchange, Payload
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.block_mover import BlockMover
from kvstore.transport.copier import Copier
from kvstore.transport.own_pages import HostPages, OwnPages
from kvstore.transport.probe import OpenedChannel, Ways, answer_probe
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.tcp import TcpChannel
from services.worker import links as links_module
from services.worker.inbox import ChannelFailed, ChannelOpened, ChannelTried, Events
from services.worker.links import Links, Movers

PEER, WAIT_S = PeerId("decode-0@1"), 30
LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")
REPORT = TransportReport(peer=PEER, kind="tcp", gib_per_s=0.0, reason="far away")


def member(name: str) -> Member:
    return Member(id=WorkerId(name), role="decode", incarnation=Incarnation(1), endpoint="", host="", pid=1)


@dataclass
class Wire:
    """An exchange that notes what is sent, or refuses it."""

    accepts: bool = True
    sent: list[tuple[Message, list[Payload]]] = field(default_factory=list)

    def send(self, peer: PeerId, message: Message, payloads: list[Payload]) -> bool:
        assert peer == PEER
        self.sent.append((message, payloads))
        return self.accepts


@dataclass
class Stopped:
    """A clock that shows what it is told."""

    at_ms: float = 0.0

    def now_ms(self) -> float:
        return self.at_ms


class Mappings:
    """A share that notes which mappings are ended."""

    def __init__(self) -> None:
        self.ended: list[object] = []

    def hang_up(self, peer: PeerId, pages: object = None) -> None:
        self.ended.append(pages)

    def close(self) -> None:
        self.ended.append("all")


class NoBlocks:
    """A block mover without anybody to move blocks to."""

    def detach(self, peer: PeerId) -> None:
        assert peer == PEER

    def stop(self) -> None:
        pass


class Noted(TcpChannel):
    """A channel that notes that it was closed."""

    def __init__(self) -> None:
        super().__init__(np.zeros((1, 4096), np.uint8))
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Bench:
    """Links with attempts whose outcomes the test decides, in the order in which they were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.woken = threading.Semaphore(0)
        self.inbox = Events(self.woken.release)
        self.outcomes: queue.SimpleQueue[OpenedChannel | PeerFailed] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[WorkerId] = queue.SimpleQueue()
        self.share, self.wire, self.clock = Mappings(), Wire(), Stopped()
        self.copier = Copier(lambda done: None)
        self.mover = NoBlocks()
        monkeypatch.setattr(links_module, "open_channel", self._open_channel)
        share, pages = cast("Share", self.share), cast("OwnPages", None)
        movers = Movers(share, self.copier, cast("BlockMover", self.mover))
        self.links = Links(member("prefill-0"), pages, movers, self.inbox, Ways(pages, share))

    def _open_channel(self, mine: Member, theirs: Member, ways: Ways) -> OpenedChannel:
        self.begun.put(theirs.id)
        outcome = self.outcomes.get(timeout=WAIT_S)
        if isinstance(outcome, PeerFailed):
            raise outcome
        return outcome

    def tried(self, outcome: OpenedChannel | PeerFailed) -> ChannelOpened | ChannelFailed | None:
        """Let the running attempt end so, and the loop hear of it."""
        self.outcomes.put(outcome)
        assert self.woken.acquire(timeout=WAIT_S)
        (event,) = self.inbox.take()
        assert isinstance(event, ChannelTried)
        return self.links.on_tried(event)

    def measure(self, report: TransportReport = REPORT) -> bool:
        return self.links.measure(report, cast("Exchange", self.wire), cast("Clock", self.clock))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(monkeypatch)
    yield made
    made.links.close()


def opened(mapping: object = None) -> tuple[Noted, OpenedChannel]:
    channel = Noted()
    return channel, OpenedChannel(channel, REPORT, cast("SharedPages | None", mapping))


def test_a_channel_is_attached_when_the_loop_hears_of_it(bench: Bench) -> None:
    bench.links.open(PEER, member("decode-0"))
    assert bench.copier.kind(PEER) is None
    assert bench.tried(opened()[1]) == ChannelOpened(REPORT)
    assert bench.copier.kind(PEER) == "tcp"


def test_a_late_result_neither_attaches_nor_touches_the_attempt_after_it(bench: Bench) -> None:
    mapping, (old, late), (new, current) = object(), opened(), opened()
    late = OpenedChannel(old, REPORT, cast("SharedPages", mapping))
    bench.links.open(PEER, member("first"))
    bench.links.close_channel(PEER)
    bench.links.open(PEER, member("second"))
    assert bench.tried(late) is None
    assert old.closed
    assert bench.share.ended[-1] is mapping
    assert bench.copier.kind(PEER) is None
    assert bench.tried(current) == ChannelOpened(REPORT)
    assert [bench.begun.get(timeout=WAIT_S) for _ in range(2)] == ["first", "second"]
    assert not new.closed


def test_a_late_failure_does_not_refuse_the_peer_that_was_dialled_again(bench: Bench) -> None:
    bench.links.open(PEER, member("first"))
    bench.links.close_channel(PEER)
    bench.links.open(PEER, member("second"))
    assert bench.tried(PeerFailed("too late")) is None
    assert bench.tried(PeerFailed("in time")) == ChannelFailed(PEER, "in time")


def test_a_peer_that_was_given_up_is_not_opened_again(bench: Bench) -> None:
    bench.links.open(PEER, member("first"))
    bench.links.close_channel(PEER)
    bench.links.open(PEER, member("second"))
    bench.links.close_channel(PEER)
    assert bench.tried(opened()[1]) is None
    assert bench.begun.get(timeout=WAIT_S) == "first"
    assert bench.begun.empty()


@pytest.fixture
def measuring(bench: Bench) -> Bench:
    bench.links.open(PEER, member("decode-0"))
    bench.tried(opened()[1])
    return bench


def test_an_answered_probe_gives_the_rate_and_is_not_repeated(measuring: Bench) -> None:
    assert measuring.measure()
    message, payloads = measuring.wire.sent[0]
    assert isinstance(message, Probe)
    measuring.links.on_probed(PEER, answer_probe(message, payloads), 4.0)
    (event,) = measuring.inbox.take()
    assert isinstance(event, ChannelOpened)
    assert event.report.gib_per_s > 0
    assert not measuring.measure(event.report)


def test_a_probe_without_an_answer_opens_the_channel_unmeasured(measuring: Bench) -> None:
    assert measuring.measure()
    measuring.links.on_tick(4_999.0)
    assert measuring.inbox.take() == []
    measuring.links.on_tick(5_000.0)
    assert measuring.inbox.take() == [ChannelOpened(REPORT)]
    assert not measuring.measure(), "measured once is enough"
    message, payloads = measuring.wire.sent[0]
    assert isinstance(message, Probe)
    measuring.links.on_probed(PEER, answer_probe(message, payloads), 6_000.0)
    assert measuring.inbox.take() == []


def test_a_probe_that_cannot_be_sent_opens_the_channel_unmeasured(measuring: Bench) -> None:
    measuring.wire.accepts = False
    assert not measuring.measure()
    measuring.links.on_tick(60_000.0)
    assert measuring.inbox.take() == []


def test_an_answer_to_an_earlier_probe_is_ignored(measuring: Bench) -> None:
    assert measuring.measure()
    message, payloads = measuring.wire.sent[0]
    assert isinstance(message, Probe)
    earlier = answer_probe(Probe(nonce=message.nonce ^ 1), payloads)
    measuring.links.on_probed(PEER, earlier, 1.0)
    assert measuring.inbox.take() == []
    measuring.links.on_probed(PEER, answer_probe(message, payloads), 2.0)
    assert len(measuring.inbox.take()) == 1


@pytest.mark.parametrize("end", ["measuring", "measured"])
def test_news_of_a_channel_that_was_closed_meanwhile_is_not_announced(measuring: Bench, end: str) -> None:
    close: Callable[[PeerId], None] = measuring.links.close_channel
    if end == "measured":
        measuring.measure()
    close(PEER)
    assert measuring.measure()
    measuring.links.on_tick(60_000.0)
    assert measuring.inbox.take() == []


@pytest.mark.parametrize("kind", [bytes, memoryview], ids=["bytes", "view"])
def test_pages_that_do_not_hold_what_was_written_to_them_end_the_worker(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[bytes], Payload]
) -> None:
    memory = open_page_memory(2 * 2**20, LAYOUT)
    own, payloads = HostPages(memory.pages), [kind(bytes([n]) * LAYOUT.page_bytes * 2) for n in (1, 2)]
    movers = Movers(cast("Share", None), cast("Copier", None), cast("BlockMover", None))
    links = Links(member("prefill-0"), own, movers, Events(lambda: None), Ways(own, cast("Share", None)))
    blocks = np.array([[4, 5], [9, 7]], np.int32)
    links.fill_blocks(blocks, payloads, verify=True)
    assert bytes(own.read([7])) == b"\2" * LAYOUT.page_bytes
    monkeypatch.setattr(own, "write", lambda pages, payload: None)
    links.fill_blocks(blocks, payloads, verify=True)  # it is there already
    with pytest.raises(KvCorrupt, match="do not hold what was written"):
        links.fill_blocks(blocks, payloads[::-1], verify=True)
    memory.close()
