"""The kit of one process: rules from a text or a file that changes, the log, and signals to itself."""

import json
import os
import signal
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.faults.points import Kind, Point, Side
from common.log import Log
from common.net.fault_kit import LOOK_MS, FaultKit


class Hand:
    """A clock that is set by hand."""

    ms = 0.0

    def now_ms(self) -> float:
        return self.ms


def kit_of(spec: str, clock: Hand | None = None, signals: list[int] | None = None) -> FaultKit:
    sent = signals if signals is not None else []
    return FaultKit(spec, "decode-0", Log(process="decode-0"), clock=clock or Hand(), end=sent.append)


def events(text: str, name: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in text.splitlines()]
    return [record for record in records if record["event"] == name]


def test_rules_that_cannot_be_read_stop_the_start() -> None:
    with pytest.raises(ConfigError, match="there is no point 'grants'"):
        kit_of("grants:drop")


def test_a_fault_is_told_before_it_acts(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    kit = FaultKit("grant:kill after=1", "decode-0", Log(), end=lambda _: told.append(capsys.readouterr().err))
    kit.strike(Point.GRANT, Side.SENT, "prefill-0")
    assert not told
    kit.strike(Point.GRANT, Side.HEARD, "prefill-0")
    (fault,) = events(told[0], "fault")
    assert (fault["point"], fault["kind"], fault["side"], fault["hit"]) == ("grant", "kill", "heard", 2)


def test_kill_and_stop_are_signals_to_the_process() -> None:
    signals: list[int] = []
    kit = kit_of("grant:stop;commit:kill;other/answer:kill", signals=signals)
    for point in (Point.GRANT, Point.COMMIT, Point.ANSWER):
        kit.strike(point, Side.SENT)
    assert signals == [signal.SIGSTOP, signal.SIGKILL]


def test_a_cut_is_told_once_and_counted_always(capsys: pytest.CaptureFixture[str]) -> None:
    kit = kit_of("grant:cut")
    for _ in range(3):
        assert kit.strike(Point.GRANT, Side.SENT, "a").has(Kind.CUT)
    assert len(events(capsys.readouterr().err, "fault")) == 1
    assert kit.counters() == {"faults_injected_total{point=grant,kind=cut}": 3.0}


def test_a_file_arms_and_disarms_and_totals_stay(tmp_path: Path) -> None:
    file, clock = tmp_path / "rules", Hand()
    kit = kit_of(f"@{file}", clock)

    def strikes() -> bool:
        clock.ms += LOOK_MS
        return bool(kit.strike(Point.GRANT, Side.SENT).faults)

    assert not strikes()  # the file is not there
    file.write_text("grant:drop times=1")
    assert [strikes(), strikes()] == [True, False]
    file.write_text("grant:drop  times=1")
    assert [strikes(), strikes()] == [True, False]  # counts begin anew
    file.unlink()
    assert not strikes()
    assert kit.counters() == {"faults_injected_total{point=grant,kind=drop}": 2.0}


def test_a_file_is_looked_at_no_more_often_than_it_need_be(tmp_path: Path) -> None:
    file, clock = tmp_path / "rules", Hand()
    kit = kit_of(f"@{file}", clock)
    file.write_text("grant:drop")
    clock.ms = LOOK_MS - 1
    assert not kit.strike(Point.GRANT, Side.SENT).faults
    clock.ms = LOOK_MS
    assert kit.strike(Point.GRANT, Side.SENT).faults


def test_rules_of_a_file_that_cannot_be_read_leave_the_old_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, clock = tmp_path / "rules", Hand()
    file.write_text("grant:drop")
    kit = kit_of(f"@{file}", clock)
    file.write_text("grant:explode")
    os.utime(file, ns=(1, 1))
    for _ in range(3):
        clock.ms += LOOK_MS
        assert kit.strike(Point.GRANT, Side.SENT).has(Kind.DROP)
    (refused,) = events(capsys.readouterr().err, "faults_refused")
    assert "there is no kind 'explode'" in str(refused["text"])
