"""A worker's report tells what its shell counts at the moment it is asked."""

import random
from unittest.mock import MagicMock

from common.ids import PeerId
from common.log import Log
from common.messages.liveness import Drain, Ping, Report
from services.worker.service import WorkerService
from tests.support.world import World

STRANGER = PeerId("stranger-0@1")


def test_a_report_tells_what_is_so_when_it_is_asked_for_not_some_time_before() -> None:
    target = World(random.Random(1), prefill_pages=64, decode_pages=64)
    exchange, clock = MagicMock(), MagicMock(now_ms=lambda: target.now_ms)
    exchange.counters.return_value = {}
    ports = MagicMock(exchange=exchange, clock=clock, checksums=None, mapped=dict, gauges=dict)
    ports.events.counters.return_value = {}
    service = WorkerService(target.processes["prefill"].core, ports, Log(), plan_ahead=False)
    for number in range(1, 4):
        service._hear(STRANGER, Drain(on=False), ())  # who gives orders must have said who it is
        service._hear(STRANGER, Ping(sequence=number), ())
        *_, report = [call.args[1] for call in exchange.send.call_args_list if isinstance(call.args[1], Report)]
        assert (report.sequence, report.counters["protocol_violations_total"]) == (number, number)
