"""How much memory this process may still take, and a clear refusal of budgets above it."""

from dataclasses import dataclass
from pathlib import Path

from common.control_groups import group_limits
from common.errors import ConfigError
from common.units import format_bytes

_UNKNOWN_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that can still be taken, and which limit says so."""

    n_bytes: int
    limit: str


def available_memory(root: Path = Path("/")) -> Available:
    """The tightest of MemAvailable and the memory limits of every control group that this process is in.

    `root` is where /proc and /sys are found.
    """
    limits = [Available(_mem_available_bytes(root / "proc/meminfo"), "MemAvailable of /proc/meminfo")]
    for group in group_limits(root):
        limits.append(Available(max(0, group.limit_bytes - group.taken_bytes), f"control group limit {group.file}"))
    return min(limits, key=lambda limit: limit.n_bytes)


def require_available(budget_bytes: int, available: Available) -> None:
    """Raise ConfigError, with the numbers, if a pool of `budget_bytes` cannot be backed."""
    if budget_bytes > available.n_bytes:
        raise ConfigError(
            f"--device-memory={format_bytes(budget_bytes)} is more than the {format_bytes(available.n_bytes)} that are "
            f"available ({available.limit}); set it lower, or free memory"
        )


def _mem_available_bytes(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return _UNKNOWN_BYTES  # not every system has it; limits of control groups still count
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return _UNKNOWN_BYTES
