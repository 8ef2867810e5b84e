"""The loop of a worker looks after itself: a standstill is written to its log, and whoever must give way is told."""

import json
from unittest.mock import MagicMock

import pytest

from common.log import Log
from common.messages.requests import Failed
from services.worker.service import WorkerService
from tests.services.worker.core.test_watchdog import hang_a_copy, world


class Ticking:
    """A clock on which every reading costs some time."""

    def __init__(self, now_ms: float) -> None:
        self.ms = now_ms

    def now_ms(self) -> float:
        self.ms += 10.0
        return self.ms


def test_a_copy_that_hangs_is_in_the_log_and_its_gateway_hears_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    target = world(watchdog_ms=1_000)
    hang_a_copy(target)
    while target.turn():  # all else is done, and the copier never answers
        pass
    clock = Ticking(target.now_ms)
    exchange, began_ms = MagicMock(), clock.ms
    exchange.receive.return_value = exchange.counters.return_value = {}
    ports = MagicMock(exchange=exchange, clock=clock, checksums=None, mapped=dict, gauges=dict)
    ports.inbox.take.return_value = []
    service = WorkerService(target.processes["prefill"].core, ports, Log(), plan_ahead=False)
    service.serve(lambda: clock.ms > began_ms + 2_500.0, lambda: False, drain_ms=0.0)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    stuck, *_ = [one for one in events if one["event"] == "stuck"]
    assert stuck["ends"] == "stuck" and stuck["requests"][0]["request"] == "stuck" and stuck["stalled_ms"] >= 1_000
    failed = [call.args[1] for call in exchange.send.call_args_list if isinstance(call.args[1], Failed)]
    assert [(one.request, one.code, one.retryable) for one in failed] == [("stuck", "stuck", True)]
