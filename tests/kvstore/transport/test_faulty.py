"""Copies that meet the fault kit: late before the first byte, failed, or one byte wrong where they went."""

from collections.abc import Sequence

import pytest

from common.errors import PeerFailed
from common.ids import PeerId
from common.log import Log
from common.messages.handover import KvSpan
from common.net.fault_kit import FaultKit
from kvstore.transport.channel import Copied
from kvstore.transport.faulty import FaultyChannel

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
