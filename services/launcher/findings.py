"""What the doctor says: findings, and how bad they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad a finding is; only FAIL keeps the system from running."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `advice` says what to change; empty if nothing."""

    level: Level
    subject: str
    text: str
    advice: str = ""


def worst(findings: Sequence[Finding]) -> Level:
    """FAIL if any failed, else WARN if any warned, else OK."""
    levels = {finding.level for finding in findings}
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)
