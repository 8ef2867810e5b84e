"""What `penstock doctor` reads of the processes of this host, under /proc, and of its memory limits. Changes nothing."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: JSON

import psutil

from common.control_groups import group_limits
from common.units import format_bytes
from services.launcher.findings import Finding, Level

_GOOD_FILES = 4096
_GOOD_PROCESSES = 1024
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Here:
    """Where the doctor looks from."""

    host: str
    """This kernel's identity; `pid_space`: that of the PID namespace, which containers have one each of."""
    pid_space: str
    machine_bytes: int
    limit_bytes: int
    """What the doctor's own control group allows, at most `machine_bytes`."""


def beside(one: Mapping[str, Any], here: Here) -> bool:
    """Whether a pid means there what it means here, and so limits do."""
    return bool(one.get("host") == here.host and one.get("pid_space") == here.pid_space)


def check_processes(status: Mapping[str, Any], here: Here, root: Path = Path("/")) -> Iterator[Finding]:
    """Limits and GPUs of the gateway, workers and stores that run here, and not in another container of this host."""
    for one in (status["gateway"], *status["workers"]):
        if not beside(one, here):
            continue
        folder = root / "proc" / str(one["pid"])
        if not folder.exists():
            text = f"{one['id']} (pid {one['pid']}) does not run here any more"
            yield Finding(Level.WARN, "process", text, "its log says why")
            continue
        yield from _limits(one, folder)
        yield from _gpus(one, folder, root)


def limits_of(text: str) -> dict[str, int]:
    """Soft limits out of /proc/PID/limits."""
    found: dict[str, int] = {}
    for line in text.splitlines()[1:]:
        words = line[26:].split()
        if words:
            found[line[:26].strip()] = _NO_LIMIT if words[0] == "unlimited" else int(words[0])
    return found


def _limits(one: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    try:
        limits = limits_of((folder / "limits").read_text())
    except (OSError, ValueError) as error:
        yield Finding(Level.WARN, "ulimits", f"{one['id']}: cannot be read: {error}", "run the doctor as the same user")
        return
    files, locked = limits.get("Max open files", _NO_LIMIT), limits.get("Max locked memory", _NO_LIMIT)
    processes, low = limits.get("Max processes", _NO_LIMIT), list[tuple[str, str]]()
    if files < _GOOD_FILES:
        low.append((f"open files {files}", f"ulimit -n {_GOOD_FILES} or more"))
    if processes < _GOOD_PROCESSES:
        low.append((f"processes {processes}", f"ulimit -u {_GOOD_PROCESSES} or more: torch starts many threads"))
    if _device(one) != "cpu" and locked < _NO_LIMIT:
        low.append((f"locked memory {locked}", "ulimit -l unlimited, for host memory that a GPU reads"))
    for text, advice in low:
        yield Finding(Level.WARN, "ulimits", f"{one['id']}: {text}", advice)
    if not low:
        yield Finding(Level.OK, "ulimits", f"{one['id']}: open files {_number(files)}, processes {_number(processes)}")


def _device(one: Mapping[str, Any]) -> str:
    return str(one.get("policies", {}).get("device", "cpu"))


def _number(limit: int) -> str:
    return "unlimited" if limit >= _NO_LIMIT else str(limit)


def _gpus(one: Mapping[str, Any], folder: Path, root: Path) -> Iterator[Finding]:
    if _device(one) == "cpu":
        return
    driver = root / "proc/driver/nvidia/version"
    version = driver.read_text().splitlines()[0] if driver.exists() else ""
    try:
        environment = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        environment = []
    seen = [word.partition(b"=")[2].decode() for word in environment if word.startswith(b"CUDA_VISIBLE_DEVICES=")]
    text = f"{one['id']} asked for {_device(one)}, CUDA_VISIBLE_DEVICES={seen[0] if seen else '(unset)'}"
    if version:
        yield Finding(Level.OK, "gpu", f"{text}; {version}")
    else:
        advice = "load the NVIDIA driver, or give the container the GPU"
        yield Finding(Level.WARN, "gpu", f"{text}; no driver is seen from here", advice)


def check_plans(status: Mapping[str, Any], here: Here) -> Iterator[Finding]:
    """The memory that processes of this host planned for fits into it, and what those of this container did into its limit."""
    on_host = [worker for worker in status["workers"] if worker.get("host") == here.host]
    yield from _fits(on_host, here.machine_bytes, "host")
    if here.limit_bytes < here.machine_bytes:
        yield from _fits([worker for worker in on_host if beside(worker, here)], here.limit_bytes, "container")


def _fits(workers: list[Mapping[str, Any]], total_bytes: int, place: str) -> Iterator[Finding]:
    if not workers:
        return
    plans = {worker["id"]: _planned_bytes(worker) for worker in workers}
    planned, each = sum(plans.values()), ", ".join(f"{name} {format_bytes(n)}" for name, n in sorted(plans.items()))
    text = f"{format_bytes(planned)} planned of {format_bytes(total_bytes)} that this {place} has: {each}"
    if planned > total_bytes:
        yield Finding(Level.FAIL, "plans", text, "lower --device-memory, --host-buffer or --host-memory of some")
    elif planned > 0.9 * total_bytes:
        yield Finding(Level.WARN, "plans", text, "less than a tenth is left for everything else: lower one of them")
    else:
        yield Finding(Level.OK, "plans", text)


def _planned_bytes(worker: Mapping[str, Any]) -> int:
    tiers = {"host", "device"} if _device(worker) == "cpu" else {"host"}
    return sum(int(part["bytes"] or 0) for part in worker.get("memory") or () if part["tier"] in tiers)


def machine_bytes() -> int:
    """What the machine has, whatever this container may use of it."""
    return int(psutil.virtual_memory().total)


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """What this machine has, or the control group of this process allows if that is less."""
    return min([machine_bytes(), *(group.limit_bytes for group in group_limits(root))])


def check_shared_folder(folder: Path = Path("/dev/shm")) -> Finding:
    """Penstock's own shared memory has no folder; others' on the same host (NCCL, Python) uses this one."""
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return Finding(Level.OK, "/dev/shm", f"not there ({error.strerror}); Penstock does not need it")
    n_bytes = room.f_bavail * room.f_frsize
    return Finding(
        Level.OK, "/dev/shm", f"{n_bytes / 2**30:.1f} GiB free; Penstock takes memfd instead, which it does not limit"
    )
