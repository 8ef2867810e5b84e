"""What `penstock doctor` looks at on this machine. Each check returns findings and changes nothing."""

import importlib.util
import os
import resource
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from common.errors import ConfigError
from common.ports import port_is_free
from common.units import GIB, MIB, MemoryShare, format_bytes
from services.launcher.findings import Finding, Level
from services.launcher.redis_server import find_redis_server

_LEAST_FILES = 1024
_GOOD_FILES = 4096
_PACKAGES = ("fastapi", "msgspec", "numpy", "pyzmq", "redis", "tokenizers", "transformers", "uvicorn")
_WORKER_PACKAGES = ("torch", "safetensors")


def check_python() -> Finding:
    """The interpreter is new enough."""
    text = sys.version.split()[0]
    if sys.version_info < (3, 11):  # noqa: UP036 - it is what this check is for
        return Finding(Level.FAIL, "python", text, "Penstock needs Python 3.11 or newer")
    return Finding(Level.OK, "python", text)


def check_packages() -> list[Finding]:
    """Every package is there; without torch only a gateway can run."""
    found: list[str] = []
    lacking: list[Finding] = []
    for name in (*_PACKAGES, *_WORKER_PACKAGES):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            only_workers = name in _WORKER_PACKAGES
            lacking.append(
                Finding(
                    Level.WARN if only_workers else Level.FAIL,
                    name,
                    "not installed" + ("; gateways run, workers do not" if only_workers else ""),
                    "make install, or pip install 'penstock[worker]'" if only_workers else "make install",
                )
            )
    return [Finding(Level.OK, "packages", ", ".join(found)), *lacking]


def check_cores() -> Finding:
    """There is a core for each of two workers."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        return Finding(
            Level.WARN, "cores", f"{cores}", "prefill and decode share one core: expect them to slow each other"
        )
    return Finding(Level.OK, "cores", f"{cores}")


def check_memory(
    device_memory: MemoryShare | int, host_memory_bytes: int, free_bytes: int, *, on_host: bool = True
) -> Finding:
    """Two workers' page memory and the KV store's fit into what is free. `host_memory_bytes` 0: no KV store.

    `on_host`: whether the workers' pages are in the host's memory.
    """
    each = str(device_memory) if isinstance(device_memory, MemoryShare) else format_bytes(device_memory)
    where = "" if on_host else ", on its GPU"
    text = f"{format_bytes(free_bytes)} available; each worker takes {each} for KV pages{where}"
    taken = device_memory.of(free_bytes) if isinstance(device_memory, MemoryShare) else device_memory
    device_memory_bytes = taken if on_host else 0
    if host_memory_bytes:
        text += f", the KV store {format_bytes(host_memory_bytes)}"
    flags = "--device-memory or --host-memory" if host_memory_bytes else "--device-memory"
    if max(device_memory_bytes, host_memory_bytes) > free_bytes:
        return Finding(Level.FAIL, "memory", text, f"lower {flags}")
    if 2 * device_memory_bytes + host_memory_bytes + GIB > free_bytes:
        return Finding(Level.WARN, "memory", text, f"two workers and a model may not fit; lower {flags}")
    return Finding(Level.OK, "memory", text)


def available_bytes() -> int:
    """Memory that processes may still take on this machine."""
    return int(psutil.virtual_memory().available)


def check_disk(folder: str, size_bytes: int) -> Finding:
    """The KV store's disk tier can be made and has room for all that it may write."""
    place = Path(folder).expanduser().absolute()
    there = next(one for one in (place, *place.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(Level.FAIL, "disk", f"{there} cannot be written to", "give another --disk")
    free_bytes = shutil.disk_usage(there).free
    text = f"{format_bytes(free_bytes)} free at {there}; the disk tier takes up to {format_bytes(size_bytes)}"
    if size_bytes > free_bytes:
        return Finding(Level.WARN, "disk", text, "it may be partly filled already; else lower --disk-size")
    return Finding(Level.OK, "disk", text)


def check_shared_memory() -> Finding:
    """Anonymous shared memory can be made: workers keep their pages in it and share it by file descriptor."""
    try:
        descriptor = os.memfd_create("penstock-doctor")
    except (AttributeError, OSError) as error:
        return Finding(
            Level.FAIL, "memfd", f"cannot be made: {error}", "run on Linux, with a kernel that allows memfd_create"
        )
    try:
        os.ftruncate(descriptor, MIB)
    except OSError as error:
        return Finding(Level.FAIL, "memfd", f"cannot hold 1 MiB: {error}", "raise the container's memory limit")
    finally:
        os.close(descriptor)
    return Finding(Level.OK, "memfd", "shared memory works")


def check_open_files() -> Finding:
    """Every streaming client is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (hard limit {hard})"
    if soft < _LEAST_FILES:
        return Finding(Level.FAIL, "open files", text, f"ulimit -n {_GOOD_FILES}")
    if soft < _GOOD_FILES:
        return Finding(Level.WARN, "open files", text, f"many clients at once need more: ulimit -n {_GOOD_FILES}")
    return Finding(Level.OK, "open files", text)


def check_port(host: str, port: int) -> Finding:
    """The gateway can listen."""
    try:
        free = port_is_free(host, port)
    except OSError as error:
        return Finding(Level.FAIL, "port", f"{host} is no address of this machine: {error}", "change --host")
    if not free:
        return Finding(
            Level.FAIL, "port", f"{host}:{port} is in use already, or may not be used", "give another --port"
        )
    return Finding(Level.OK, "port", f"{host}:{port} is free")


def check_redis_binary() -> Finding:
    """A Redis can be started if none is given."""
    try:
        return Finding(Level.OK, "redis", f"penstock up would start {find_redis_server()}")
    except ConfigError as error:
        return Finding(Level.FAIL, "redis", "no server binary", str(error))


def check_device(device: str) -> Finding:
    """The device that the workers would compute on is there."""
    if importlib.util.find_spec("torch") is None:
        return Finding(Level.WARN, "device", "unknown: torch is not installed", "pip install 'penstock[worker]'")
    import torch  # takes seconds, and a gateway's machine has none

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    seen = f"GPUs seen by torch {torch.__version__}: {', '.join(gpus) or 'none'}"
    if device == "cpu":
        return Finding(Level.OK, "device", f"cpu; {seen}")
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        return Finding(Level.FAIL, "device", f"--device={device!r}", "must be cpu, cuda or cuda:N")
    if int(index or 0) >= len(gpus):
        return Finding(
            Level.FAIL,
            "device",
            f"{device} is not there; {seen}",
            "check the driver, a CUDA build of torch, CUDA_VISIBLE_DEVICES",
        )
    return Finding(Level.OK, "device", f"{device}; {seen}")


def check_peer_access() -> list[Finding]:
    """GPUs of this host can read each other's memory: cuda_ipc needs it."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch  # takes seconds, and a gateway's machine has none

    n_gpus = torch.cuda.device_count()
    pairs = [(a, b) for a in range(n_gpus) for b in range(n_gpus) if a != b]
    apart = [f"{a} -> {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        advice = "KV between them goes through host memory: place pairs on GPUs with NVLink or under one PCIe switch"
        return [Finding(Level.WARN, "gpu", f"no peer access: {', '.join(apart)}", advice)]
    return [Finding(Level.OK, "gpu", f"{n_gpus} GPUs have peer access to each other")] if pairs else []
