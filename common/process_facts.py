"""What a process tells of itself in its membership record and its reports, so that two can be compared."""

import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

_SECRET = frozenset({"cluster_key", "faults"})
"""Settings of which others only hear whether they are set."""


def software_versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def policies_of(settings: object, names: Sequence[str]) -> dict[str, str]:
    """These fields of a settings class by flag; those that are unset are left out."""
    found: dict[str, str] = {}
    for name in names:
        value = getattr(settings, name)
        if name in _SECRET:
            value = "set" if value is not None else "off"
        if value is not None:
            found[name.removesuffix("_bytes").replace("_", "-")] = _text(value)
    return found


def _text(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def clock_gauges() -> dict[str, float]:
    """The wall clock, for whoever compares it with others'."""
    return {"unix_ms": float(time.time_ns() // 1_000_000)}
