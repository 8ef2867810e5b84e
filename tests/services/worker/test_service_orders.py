"""Memory is ordered away only when nobody reads it for a checksum any more."""

import threading
from unittest.mock import MagicMock

import pytest

from common.ids import PeerId, RequestId
from common.kv_layout import KvLayout
from common.log import Log
from common.messages.requests import Cancel
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.own_pages import HostPages
from services.worker.checksum_thread import ChecksumsMade, ChecksumThread, Pages
from services.worker.core.actions import LendChunks, ResizeMemory, TakeBackChunks
from services.worker.core.spare_memory import SYSTEM
from services.worker.service import WorkerService

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")


class Slow(ChecksumThread):
    """Its thread gets no turn before somebody waits for it."""

    def __init__(self, own: HostPages, made: list[ChecksumsMade]) -> None:
        self.turn = threading.Event()

        def note(one: ChecksumsMade) -> None:
            assert self.turn.wait(30)
            made.append(one)

        super().__init__(own, note)

    def drain(self, within_s: float = 10.0) -> None:
        self.turn.set()
        super().drain(within_s)


@pytest.mark.parametrize(
    "order",
    [ResizeMemory(1), LendChunks((0,), SYSTEM), TakeBackChunks((0,), SYSTEM)],
    ids=lambda one: type(one).__name__,
)
def test_memory_goes_only_after_what_was_posted_is_read(order: ResizeMemory | LendChunks | TakeBackChunks) -> None:
    memory, made, read_before = open_page_memory(4 * 2**20, LAYOUT), list[ChecksumsMade](), list[int]()
    checksums = Slow(HostPages(memory.pages), made)
    core, ports = MagicMock(), MagicMock(checksums=checksums)
    core.memory_orders.return_value = []
    ports.memory.order = ports.lender.carry_out = lambda _: read_before.append(len(made))
    service = WorkerService(core, ports, Log(), plan_ahead=False)
    checksums.post(1, Pages((0,)))
    service._act([order], ())
    assert read_before == [1]
    checksums.turn.set()
    checksums.stop()
    memory.close()


def test_a_peer_that_cannot_be_sent_anything_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    core, ports = MagicMock(), MagicMock()
    ports.exchange.send.return_value = False
    service = WorkerService(core, ports, Log(), plan_ahead=False)
    for number in range(50):
        service._send(PeerId("decode-0@1"), Cancel(request=RequestId(f"r{number}")), ())
    assert "".join(capsys.readouterr()).count('"send_refused"') == 1
    assert core.on_unsent.call_count == 50
    assert service._unsent.total == 50
