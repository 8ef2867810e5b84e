"""Copies that meet the fault kit: late before the first byte, failed, or one byte wrong where they went."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import PeerId
from common.log import Log
from common.messages.handover import KvSpan
from common.net.fault_kit import FaultKit
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.channel import Copied
from kvstore.transport.faulty import FaultyChannel, FaultyPages
from kvstore.transport.own_pages import HostPages
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.shm import ShmChannel
from tests.kvstore.transport.test_block_mover import LAYOUT, MIB, STORE, mapped

SPAN = KvSpan(0, 0, 2)
PEER = PeerId("decode-0@1")


class Recorder:
    """A channel by payload that notes what it was given, and when it slept."""

    kind = "tcp"

    def __init__(self) -> None:
        self.done: list[object] = []

    def posted(self, span: KvSpan) -> None:
        self.done.append("posted")

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        self.done.append("copied")
        return Copied(1, 8, bytearray(8))

    def close(self) -> None:
        self.done.append("closed")


def channel_with(rules: str) -> tuple[FaultyChannel, Recorder]:
    inner = Recorder()
    return FaultyChannel(inner, FaultKit(rules, "prefill-0", Log()), PEER, None, inner.done.append), inner


def test_without_a_rule_that_concerns_it_nothing_changes() -> None:
    channel, inner = channel_with("grant:drop;transfer:fail peer=decode-1")
    assert channel.copy(SPAN, [7, 3], [0, 1]).payload == bytes(8)
    channel.posted(SPAN)
    channel.close()
    assert inner.done == ["copied", "posted", "closed"]


def test_a_late_copy_waits_before_its_first_byte() -> None:
    channel, inner = channel_with("transfer:delay ms=20")
    channel.copy(SPAN, [7, 3], [0, 1])
    assert inner.done == [0.02, "copied"]


@pytest.mark.parametrize(("kind", "failed"), [("fail after=1 times=1", 1), ("cut after=1", 2)])
def test_a_copy_fails_before_its_first_byte(kind: str, failed: int) -> None:
    channel, inner = channel_with(f"transfer:{kind}")
    channel.copy(SPAN, [7, 3], [0, 1])
    for _ in range(failed):
        with pytest.raises(PeerFailed, match="injected failure: copy of layer 0"):
            channel.copy(SPAN, [7, 3], [0, 1])
    assert inner.done == ["copied"]


def test_of_a_payload_one_byte_is_another() -> None:
    channel, _ = channel_with("transfer:corrupt")
    payload = channel.copy(SPAN, [7, 3], [0, 1]).payload
    assert payload is not None and sorted(bytes(payload)) == [0] * 7 + [255]


@pytest.fixture
def memories() -> Iterator[tuple[PageMemory, SharedPages]]:
    """Our own, of zeros, and a peer's as it is mapped here, of ones."""
    own, peer = open_page_memory(2 * MIB, LAYOUT), open_page_memory(2 * MIB, LAYOUT)
    peer.pages.rows[:] = 1
    shared = mapped(peer)
    yield own, shared
    shared.close()
    own.close()
    peer.close()


Memories = tuple[PageMemory, SharedPages]


def pages_with(rules: str, own: PageMemory, slept: list[float], buffer: PeerId = PEER) -> FaultyPages:
    return FaultyPages(HostPages(own.pages), FaultKit(rules, "prefill-0", Log()), buffer, slept.append)


def wrong(row: object, value: int) -> int:
    return int(np.count_nonzero(np.asarray(row) != value))


def test_blocks_strike_the_point_that_their_way_has(memories: Memories) -> None:
    own, shared = memories
    slept: list[float] = []
    rules = "fetch:delay ms=1;spill:delay ms=2;park:delay ms=3"
    pages = pages_with(rules, own, slept)
    pages.copy_in([0], shared, [0])
    pages.copy_out([0], shared, [0])
    pages_with(rules, own, slept, STORE).copy_out([0], shared, [0])
    assert slept == [0.001, 0.002, 0.003]


def test_of_a_page_that_came_or_went_one_byte_is_another(memories: Memories) -> None:
    own, shared = memories
    pages = pages_with("fetch:corrupt;spill:corrupt", own, [])
    pages.copy_in([0, 1], shared, [0, 1])
    assert [wrong(own.pages.rows[page], 1) for page in (0, 1)] == [0, 1]
    pages.copy_out([5, 6], shared, [2, 3])
    assert [wrong(row, 0) for row in shared.read([2, 3])] == [0, 1]
    assert wrong(own.pages.rows[6], 0) == 0


def test_a_block_that_fails_moves_no_byte(memories: Memories) -> None:
    own, shared = memories
    with pytest.raises(PeerFailed, match="injected failure: fetch"):
        pages_with("fetch:fail", own, []).copy_in([0], shared, [0])
    assert wrong(own.pages.rows, 0) == 0


def test_a_hand_over_by_shared_memory_is_spoilt_where_it_went(memories: Memories) -> None:
    own, shared = memories
    inner = ShmChannel(own.pages.rows, shared)
    channel = FaultyChannel(inner, FaultKit("transfer:corrupt", "prefill-0", Log()), STORE, shared)
    channel.copy(SPAN, [0, 1], [4, 5])
    assert [wrong(row, 0) for row in shared.read([4, 5])] == [0, 1]
    assert wrong(own.pages.rows, 0) == 0
