"""The machine and the source tree that a run was made with."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any  # Any: JSON

_ROOT = Path(__file__).parents[1]


def host_facts() -> dict[str, Any]:
    """For the record; the load average shows who else was busy."""
    return {
        "name": platform.node(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "revision": _revision(),
    }


def _revision() -> str | None:
    """Git's name for this source tree; None outside one."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
