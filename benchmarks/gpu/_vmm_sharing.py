"""One memory at several addresses: within a handle, within a process, and between two processes."""

import ctypes
import itertools
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.table import Row
from common.errors import ServingError
from kvstore.memory.backend import VmMisuse
from kvstore.memory.cuda_driver import CudaDriver

_MIB = 2**20
_CHUNK_BYTES = 2 * _MIB
_ENOUGH_MAPPINGS = 100_000
_PROBE_S = 4.0
_RUN = 512
_SHARED_CHUNKS, _SHARED_BYTES = 4, 64 * _MIB
_COPIES = 10


def offset_into_handle(quick: bool) -> list[Row]:
    """Whether a part of a 64 MiB handle can be mapped by itself, and shows the right bytes."""
    del quick
    driver = CudaDriver(0)
    handle, rows = driver.create(64 * _MIB), list[Row]()
    whole, part = driver.reserve(64 * _MIB), driver.reserve(64 * _MIB)
    driver.map(whole, 64 * _MIB, handle)
    driver.allow(whole, 64 * _MIB)
    for offset_mib in (2, 32, 62):
        _fill(driver, whole + offset_mib * _MIB, 2 * _MIB, offset_mib)
        try:
            driver.map(part, 2 * _MIB, handle, offset_mib * _MIB)
            driver.allow(part, 2 * _MIB)
            seen, text = _first_byte(driver, part) == offset_mib, "mapped, and compared with the whole"
            driver.unmap(part, 2 * _MIB)
        except (ServingError, VmMisuse) as error:
            seen, text = False, str(error)
        rows.append(Row(f"map at offset {offset_mib} MiB of a 64 MiB handle", float(seen), "works", None, text))
    return rows


def aliases(quick: bool) -> list[Row]:
    """Whether two addresses show one memory, and how many mappings one handle and one context bear."""
    driver = CudaDriver(0)
    handles = [driver.create(_CHUNK_BYTES) for _ in range(1 if quick else _RUN)]
    address = driver.reserve(2 * _CHUNK_BYTES)
    for place in (address, address + _CHUNK_BYTES):
        driver.map(place, _CHUNK_BYTES, handles[0])
    driver.allow(address, 2 * _CHUNK_BYTES)
    _fill(driver, address, _CHUNK_BYTES, 77)
    same = _first_byte(driver, address + _CHUNK_BYTES) == 77
    rows = [Row("one handle at two addresses shows the same bytes", float(same), "works", None, "")]
    one_big = driver.reserve(_ENOUGH_MAPPINGS * _CHUNK_BYTES)
    runs = [one_big + i * _RUN * _CHUNK_BYTES for i in range(_ENOUGH_MAPPINGS // _RUN)]
    rows.append(_probe(driver, "one handle, one reservation", handles[:1], iter(runs)))
    fresh = (driver.reserve(_RUN * _CHUNK_BYTES) for _ in itertools.count())
    rows.append(_probe(driver, f"{len(handles)} handles, a reservation for each {_RUN}", handles, fresh))
    return rows


def _probe(driver: CudaDriver, what: str, handles: list[int], addresses: Iterator[int]) -> Row:
    """Map runs until the driver refuses, or enough; undo them."""
    begin, done, text = time.perf_counter(), list[int](), f"stopped at {_ENOUGH_MAPPINGS} or {_PROBE_S} s"
    try:
        while len(done) * _RUN < _ENOUGH_MAPPINGS - _RUN and time.perf_counter() - begin < _PROBE_S:
            address = next(addresses)
            done.append(address)
            for i in range(_RUN):
                driver.map(address + i * _CHUNK_BYTES, _CHUNK_BYTES, handles[i % len(handles)])
            driver.allow(address, _RUN * _CHUNK_BYTES)
    except (ServingError, VmMisuse) as error:
        text = str(error)
        done.pop()
    for address in done:
        driver.unmap(address, _RUN * _CHUNK_BYTES)
    return Row(f"live mappings, {what}", float(len(done) * _RUN), "maps", None, text)


def two_processes(quick: bool) -> list[Row]:
    """Export to another process, its import, and its write through the mapping beside a copy of its own."""
    del quick
    driver = CudaDriver(0)
    length_bytes = _SHARED_CHUNKS * _SHARED_BYTES
    handles = [driver.create(_SHARED_BYTES) for _ in range(_SHARED_CHUNKS)]
    address = _map_all(driver, handles)
    _fill(driver, address, length_bytes, 1)
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "benchmarks.gpu._vmm_sharing", str(there.fileno())]
    with subprocess.Popen(command, pass_fds=[there.fileno()], stdout=subprocess.PIPE, text=True) as child:
        begin = time.perf_counter()
        fds = [driver.export_fd(handle) for handle in handles]
        export_us = (time.perf_counter() - begin) / len(fds) * 1e6
        socket.send_fds(here, [b"chunks"], fds)
        printed, _ = child.communicate(timeout=30)
    if child.returncode:
        raise RuntimeError(f"the second process ended with {child.returncode}")
    import_us, map_us, shared_gb_per_s, local_gb_per_s = (float(word) for word in printed.split())
    landed = all(_first_byte(driver, address + i * _SHARED_BYTES) == 9 for i in range(_SHARED_CHUNKS))
    return [
        Row("export a 64 MiB handle", export_us, "us", None, "mean of 4"),
        Row("import a 64 MiB handle in another process", import_us, "us", None, "mean of 4"),
        Row("map and allow 4 imported handles", map_us, "us", None, ""),
        Row("what the other process wrote is here", float(landed), "works", None, "first byte of each chunk"),
        Row("copy into imported memory, 256 MiB", shared_gb_per_s, "GB/s", shared_gb_per_s / local_gb_per_s,
            f"{local_gb_per_s:.0f} GB/s into own memory (bytes written once a second)"),
    ]  # fmt: skip


def _other_process(fd: int) -> None:
    """Import, write 9 everywhere, and time copies."""
    driver = CudaDriver(0)
    with socket.socket(fileno=fd) as channel:
        _, fds, _, _ = socket.recv_fds(channel, 64, _SHARED_CHUNKS)
    begin = time.perf_counter()
    handles = [driver.import_fd(received) for received in fds]
    import_us = (time.perf_counter() - begin) / len(fds) * 1e6
    begin = time.perf_counter()
    shared = _map_all(driver, handles)
    map_us = (time.perf_counter() - begin) * 1e6
    source, own = (_map_all(driver, [driver.create(_SHARED_BYTES) for _ in fds]) for _ in range(2))
    _fill(driver, source, _SHARED_CHUNKS * _SHARED_BYTES, 9)
    rates = [_copy_gb_per_s(driver, target, source) for target in (shared, own)]
    print(import_us, map_us, *rates)


def _map_all(driver: CudaDriver, handles: list[int]) -> int:
    address = driver.reserve(len(handles) * _SHARED_BYTES)
    for i, handle in enumerate(handles):
        driver.map(address + i * _SHARED_BYTES, _SHARED_BYTES, handle)
    driver.allow(address, len(handles) * _SHARED_BYTES)
    return address


def _copy_gb_per_s(driver: CudaDriver, target: int, source: int) -> float:
    length_bytes, taken_s = _SHARED_CHUNKS * _SHARED_BYTES, []
    for _ in range(_COPIES):
        begin = time.perf_counter()
        driver.enter("cuMemcpyDtoD", target, source, length_bytes)
        driver.enter("cuCtxSynchronize")
        taken_s.append(time.perf_counter() - begin)
    return length_bytes / statistics.median(taken_s) / 1e9


def _fill(driver: CudaDriver, address: int, length_bytes: int, value: int) -> None:
    driver.enter("cuMemsetD8", address, value, length_bytes)
    driver.enter("cuCtxSynchronize")


def _first_byte(driver: CudaDriver, address: int) -> int:
    seen = ctypes.c_ubyte()
    driver.enter("cuMemcpyDtoH", ctypes.addressof(seen), address, 1)
    return seen.value


if __name__ == "__main__":
    _other_process(int(sys.argv[1]))
