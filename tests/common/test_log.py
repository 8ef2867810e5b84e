"""Log lines are events that a machine can read."""

import errno
import io
import json
import sys

import pytest

from common.log import Log


def test_every_event_is_one_json_line_with_the_process_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(process="p")
    log.event("first", request="r\n1", count=2)
    log.event("second", odd={1}.__class__)
    lines = capsys.readouterr().err.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["event"], r["process"]) for r in records] == [("first", "p"), ("second", "p")]
    assert records[0]["request"] == "r\n1" and records[0]["count"] == 2
    assert all(r["at"] > 1e9 for r in records)


def test_a_log_that_cannot_be_written_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    full = FullDisk()
    monkeypatch.setattr(sys, "stderr", full)
    Log(process="p").event("lost")
    assert full.getvalue() == ""
