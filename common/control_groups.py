"""Memory limits of the control groups that this process is in, as Linux tells them under /proc and /sys (versions 1 and 2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """Of one group that has a limit."""

    limit_bytes: int
    taken_bytes: int
    """By all processes of the group, without what the kernel would take back at once."""
    file: Path
    """Where the limit stands."""


def group_limits(root: Path = Path("/")) -> Iterator[GroupLimit]:
    """Of every group from that of this process up to the root; none where there are no groups, or no limits.

    `root` is where /proc and /sys are found.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _upwards(root / "sys/fs/cgroup", path, *_V2)
        elif "memory" in controllers.split(","):
            yield from _upwards(root / "sys/fs/cgroup/memory", path, *_V1)


def _upwards(mount: Path, path: str, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[GroupLimit]:
    group = mount / path.lstrip("/")
    # Inside a container the path may be the host's and not exist here; its ancestors up to the mount do.
    for place in (group, *group.parents):
        limit, usage = _number(place / limit_name), _number(place / usage_name)
        if limit is not None and usage is not None and limit < _UNLIMITED_BYTES:
            yield GroupLimit(limit, usage - _stat(place / "memory.stat", reclaimable_name), place / limit_name)
        if place == mount:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # not every system has every file; the other limits still count


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _stat(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
