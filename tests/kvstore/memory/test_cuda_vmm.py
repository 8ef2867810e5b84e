"""How the device's back end uses the driver: which calls, how many, and what its errors become."""

import os

import pytest
import torch

from common.errors import ConfigError, OutOfChunks
from kvstore.memory import cuda_driver, cuda_vmm
from kvstore.memory.backend import VmMisuse
from kvstore.memory.cuda_vmm import CudaVmmBackend
from tests.kvstore.memory.pretended_driver import UNIT, PretendedCuda, Status


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    made = PretendedCuda(64 * UNIT)
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: made)
    return made


def opened() -> CudaVmmBackend:
    return CudaVmmBackend(torch.device("cpu"), cuda_driver.CudaDriver(0))


def test_a_run_takes_one_access_call_and_one_unmap(cuda: PretendedCuda) -> None:
    backend = opened()
    where, chunks = backend.reserve(8 * UNIT), [backend.create(UNIT) for _ in range(8)]
    backend.map_run(where, 0, chunks)
    backend.unmap_run(where, 0, 8)
    assert [cuda.calls.count(name) for name in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap")] == [8, 1, 1]
    backend.close()


def test_a_run_that_fails_halfway_leaves_nothing_mapped(cuda: PretendedCuda) -> None:
    backend = opened()
    where, chunks = backend.reserve(8 * UNIT), [backend.create(UNIT) for _ in range(3)]
    for call in ("cuMemMap", "cuMemSetAccess"):
        cuda.fail[call] = Status.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(VmMisuse, match=f"{call} failed with CUDA_ERROR_INVALID_VALUE"):
            backend.map_run(where, 0, chunks)
        assert (cuda.mapped, backend.live_mappings) == ({}, 0)
    backend.map_run(where, 0, chunks)
    backend.close()


def test_released_memory_goes_back_and_its_name_never_comes_again(cuda: PretendedCuda) -> None:
    backend = opened()
    chunk = backend.create(UNIT)
    backend.release(chunk)
    assert not cuda.handles
    assert backend.create(UNIT) != chunk
    backend.close()


def test_mappings_stop_at_the_ceiling(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_vmm, "MAX_LIVE_MAPPINGS", 3)
    backend = opened()
    where, chunk = backend.reserve(8 * UNIT), backend.create(UNIT)
    backend.map_run(where, 0, [chunk, chunk])
    with pytest.raises(OutOfChunks, match="2 are live, and 3 are borne: use larger chunks"):
        backend.map_run(where, 2 * UNIT, [chunk, chunk])
    backend.map_run(where, 2 * UNIT, [chunk])
    backend.close()


def test_every_call_is_made_in_the_devices_context(cuda: PretendedCuda) -> None:
    backend = opened()
    begin = len(cuda.calls)
    where, chunk = backend.reserve(UNIT), backend.create(UNIT)
    backend.map_run(where, 0, [chunk])
    backend.unmap_run(where, 0, 1)
    backend.release(chunk)
    backend.unreserve(where)
    made = cuda.calls[begin:]
    assert made[::2] == ["cuCtxSetCurrent"] * (len(made) // 2)
    assert made[1::2] == [
        "cuMemAddressReserve",
        "cuMemCreate",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemRelease",
        "cuMemAddressFree",
    ]
    backend.close()


def test_closing_gives_back_handles_mappings_and_addresses(cuda: PretendedCuda) -> None:
    backend = opened()
    where = backend.reserve(8 * UNIT)
    backend.map_run(where, 2 * UNIT, [backend.create(UNIT), backend.create(2 * UNIT)])
    backend.release(backend.create(UNIT))
    backend.close()
    assert not (cuda.handles or cuda.mapped or cuda.reserved)
    assert cuda.calls[-1] == "cuDevicePrimaryCtxRelease"


def test_a_device_that_is_not_there_is_the_operators_affair(cuda: PretendedCuda) -> None:
    with pytest.raises(ConfigError, match="CUDA_ERROR_NO_DEVICE"):
        cuda_driver.CudaDriver(1)


def test_a_machine_without_the_driver_is_told_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the driver")
    with pytest.raises(ConfigError, match="device cuda needs the"):
        cuda_driver.CudaDriver(0)


def test_descriptors_are_exported_all_or_none(cuda: PretendedCuda) -> None:
    backend = opened()
    chunks = [backend.create(UNIT) for _ in range(4)]
    fds, left = len(os.listdir("/proc/self/fd")), iter((False, False, True))
    export = cuda.cuMemExportToShareableHandle

    def fails_third(handle: int, kind: str, flags: int) -> tuple[Status, int] | tuple[Status]:
        return (Status.CUDA_ERROR_INVALID_VALUE,) if next(left) else export(handle, kind, flags)

    cuda.cuMemExportToShareableHandle = fails_third  # type: ignore[method-assign]
    with pytest.raises(VmMisuse, match="cuMemExportToShareableHandle failed"):
        backend.export_fds(chunks)
    assert len(os.listdir("/proc/self/fd")) == fds
    backend.close()


def test_imported_memory_is_the_exporters(cuda: PretendedCuda) -> None:
    backend, guest = opened(), cuda_driver.CudaDriver(0)
    where, chunk = backend.reserve(UNIT), backend.create(UNIT)
    backend.map_run(where, 0, [chunk])
    (fd,) = backend.export_fds([chunk])
    handle, address = guest.import_fd(fd), guest.reserve(UNIT)
    os.close(fd)
    guest.map(address, UNIT, handle)
    guest.allow(address, UNIT)
    backend.bytes_at(where, UNIT).fill_(6)
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), UNIT)
    assert bool((torch.empty(0, dtype=torch.uint8).set_(storage, 0, (UNIT,), (1,)) == 6).all())
    guest.unmap(address, UNIT)
    guest.release(handle)
    guest.unreserve(address, UNIT)
    backend.close()
