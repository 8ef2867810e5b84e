"""Injected faults: as many as asked for, the same ones for the same seed."""

from collections.abc import Sequence

import pytest

from common.errors import PeerFailed
from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.faulty import Faults, FaultyChannel

SPAN = KvSpan(0, 0, 2)


class Recorder:
    """A channel that notes which source pages it was given."""

    kind = "shm"

    def __init__(self) -> None:
        self.copied: list[list[int]] = []
        self.closed = False

    def posted(self, span: KvSpan) -> None:
        del span

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        self.copied.append(list(source_pages))
        return Copied(1, 1)

    def close(self) -> None:
        self.closed = True


def outcome(faults: Faults) -> tuple[list[list[int]], int, list[float]]:
    inner, slept = Recorder(), list[float]()
    channel, failed = FaultyChannel(inner, faults, 8, slept.append), 0
    for _ in range(200):
        try:
            channel.copy(SPAN, [7, 3], [0, 1])
        except PeerFailed:
            failed += 1
    channel.close()
    assert inner.closed
    return inner.copied, failed, slept


def test_without_faults_nothing_changes() -> None:
    assert outcome(Faults()) == ([[7, 3]] * 200, 0, [])


def test_each_fault_hits_its_share_of_copies() -> None:
    copied, failed, slept = outcome(Faults(fail_share=0.25, delay_share=0.5, delay_ms=20.0, corrupt_share=0.1))
    assert 30 <= failed <= 70
    assert 70 <= len(slept) <= 130
    assert set(slept) == {0.02}
    assert 5 <= copied.count([0, 3]) <= 30
    assert copied.count([0, 3]) + copied.count([7, 3]) == 200 - failed


@pytest.mark.parametrize("seed", [0, 1])
def test_one_seed_gives_one_sequence_of_faults(seed: int) -> None:
    assert outcome(Faults(seed=seed, fail_share=0.3)) == outcome(Faults(seed=seed, fail_share=0.3))


def test_another_seed_gives_another_sequence() -> None:
    assert outcome(Faults(corrupt_share=0.3)) != outcome(Faults(seed=1, corrupt_share=0.3))
