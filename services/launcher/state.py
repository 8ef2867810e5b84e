"""The `state` event of `penstock up`: its children, and what it waits for. For whoever asks with SIGUSR1."""

import os
import time
from typing import Any  # Any: JSON

from common.dump_signal import write_at_once
from services.launcher.processes import Child
from services.launcher.system import System


def write_state(system: System) -> None:
    """Write it to standard error at once.

    Called between any two steps of the main thread: it waits for no lock. A child that has ended is reaped.
    """
    write_at_once(state(system, time.time()))


def state(system: System, now_unix_s: float) -> dict[str, Any]:
    """As one JSON object."""
    return {
        "at": round(now_unix_s, 3),
        "event": "state",
        "process": "up",
        "pid": os.getpid(),
        "waits_for": system.stage,
        "children": [
            _child(child, system.restart_in_s(child.plan.name), now_unix_s) for child in list(system.children)
        ],
    }


def _child(child: Child, restart_in_s: float | None, now_unix_s: float) -> dict[str, Any]:
    """`exit_codes`: of lives that are over, the newest last, negative where a signal ended it."""
    code = child.poll()
    return {
        "name": child.plan.name,
        "role": child.plan.role,
        "pid": child.pid,
        "since_unix_s": round(child.started_unix_s, 3),
        "running_s": round(now_unix_s - child.started_unix_s, 1) if code is None else None,
        "starts": child.starts_total,
        "exit_codes": [*child.exit_codes, *([] if code is None else [code])],
        "restart_in_s": None if restart_in_s is None else round(restart_in_s, 1),
        "log": str(child.log_path),
    }
