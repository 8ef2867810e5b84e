"""What others do wrong is counted wholly and logged sparsely."""

from typing import Any

from common.net.violations import Violations


class Lines:
    """A log that keeps what it was told, and the time that it is."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []
        self.now_s = 100.0

    def event(self, name: str, **fields: Any) -> None:
        self.written.append({"event": name, **fields})


def made() -> tuple[Violations, Lines]:
    lines = Lines()
    return Violations("bad_frame", lines, lambda: lines.now_s), lines  # type: ignore[arg-type]


def test_a_culprit_has_one_line_in_ten_seconds_that_says_how_many_there_were() -> None:
    violations, lines = made()
    for _ in range(50):
        violations.note("a@1", "nonsense")
        lines.now_s += 0.1
    lines.now_s += 10.0
    violations.note("a@1", "again")
    assert violations.total == 51
    assert [(line["text"], line["unlogged"]) for line in lines.written] == [("nonsense", 0), ("again", 49)]


def test_each_culprit_is_told_at_once() -> None:
    violations, lines = made()
    for name in ("a@1", "b@1", "a@1"):
        violations.note(name, "nonsense")
    assert [line["peer"] for line in lines.written] == ["a@1", "b@1"]


def test_who_takes_a_new_name_each_time_cannot_fill_the_log() -> None:
    violations, lines = made()
    for number in range(5_000):
        violations.note(f"a@{number}", "nonsense")
    assert violations.total == 5_000 and len(lines.written) == 256
