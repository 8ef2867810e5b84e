"""How much memory this process may still take, and a clear refusal of budgets above it."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.units import format_bytes

_UNLIMITED_BYTES = 1 << 60
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that can still be taken, and which limit says so."""

    n_bytes: int
    limit: str


def available_memory(root: Path = Path("/")) -> Available:
    """The tightest of MemAvailable and the memory limits of every control group that this process is in.

    `root` is where /proc and /sys are found.
    """
    limits = [Available(_mem_available_bytes(root), "MemAvailable of /proc/meminfo")]
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            limits += _group_limits(root / "sys/fs/cgroup", path, *_V2)
        elif "memory" in controllers.split(","):
            limits += _group_limits(root / "sys/fs/cgroup/memory", path, *_V1)
    return min(limits, key=lambda limit: limit.n_bytes)


def require_available(budget_bytes: int, available: Available) -> None:
    """Raise ConfigError, with the numbers, if a pool of `budget_bytes` cannot be backed."""
    if budget_bytes > available.n_bytes:
        raise ConfigError(
            f"--device-memory={format_bytes(budget_bytes)} is more than the {format_bytes(available.n_bytes)} that are "
            f"available ({available.limit}); set it lower, or free memory"
        )


def _mem_available_bytes(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return _UNLIMITED_BYTES


def _group_limits(mount: Path, path: str, limit_name: str, usage_name: str, reclaimable_name: str) -> list[Available]:
    found: list[Available] = []
    group = mount / path.lstrip("/")
    # Inside a container the path may be the host's and not exist here; its ancestors up to the mount do.
    for place in [group, *group.parents]:
        limit, usage = _number(place / limit_name), _number(place / usage_name)
        if limit is not None and usage is not None and limit < _UNLIMITED_BYTES:
            reclaimable = _stat(place / "memory.stat", reclaimable_name)
            found.append(Available(max(0, limit - usage + reclaimable), f"control group limit {place / limit_name}"))
        if place == mount:
            break
    return found


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
