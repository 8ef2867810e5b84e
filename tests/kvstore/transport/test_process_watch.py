"""When a process counts as gone that cannot be watched by a descriptor."""

import os
from pathlib import Path

import pytest

from kvstore.transport.process_watch import ProcessWatch, _began


def test_a_process_of_which_nothing_can_be_read_now_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(path: Path) -> str:
        raise OSError(24, f"Too many open files: {path}")

    watch = ProcessWatch(None, os.getpid(), _began(os.getpid()) or "")
    assert not watch.gone
    monkeypatch.setattr(Path, "read_text", no_more)
    assert not watch.gone


def test_another_process_of_the_same_number_is_not_the_one_that_connected() -> None:
    assert ProcessWatch(None, os.getpid(), "1").gone
