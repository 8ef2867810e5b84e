"""The driver's virtual memory calls over host memory, as strict as the real ones: for tests of what calls them.

A handle is a memfd; mapped memory is inaccessible before access is set; an unmap must not cut a mapping.
"""

import ctypes
import enum
import mmap
import os
from types import SimpleNamespace
from typing import Any

from kvstore.memory.memfd import _load_libc

UNIT = 4096
_FIXED, _NONE = 0x10, 0
_HOLE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


class Status(enum.IntEnum):
    """What calls return first."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100


_OK, _INVALID = Status.CUDA_SUCCESS, (Status.CUDA_ERROR_INVALID_VALUE,)


class _AnyName:
    def __getattr__(self, name: str) -> str:
        return name


class PretendedCuda:
    """Stands for the module `cuda.bindings.driver`. `fail`: names of calls that fail once, with their status."""

    CUdevice_attribute = CUmemAllocationType = CUmemLocationType = CUmemAllocationHandleType = _AnyName()
    CUmemAllocationGranularity_flags = CUmemAccess_flags = _AnyName()

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes, self.fail, self.calls = capacity_bytes, dict[str, Status](), list[str]()
        self._libc = _load_libc()
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.handles: dict[int, tuple[int, int]] = {}  # fd and length
        self.mapped: dict[int, int] = {}  # address -> length
        self.reserved: dict[int, int] = {}
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu"):
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            status = self.fail.pop(name, None)
            return found(*arguments) if status is None else (status,)

        return call

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def cuInit(self, flags: int) -> tuple[Status]:
        return (_OK,)

    def cuDeviceGet(self, index: int) -> tuple[Status, int] | tuple[Status]:
        return (_OK, index) if index == 0 else (Status.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGetAttribute(self, name: str, device: int) -> tuple[Status, int]:
        return _OK, 1

    def cuDeviceGetUuid(self, device: int) -> tuple[Status, SimpleNamespace]:
        return _OK, SimpleNamespace(bytes=bytes(range(16)))

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, str]:
        return _OK, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Status]:
        return (_OK,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Status]:
        return (_OK,)

    def cuCtxSynchronize(self) -> tuple[Status]:
        return (_OK,)

    def cuMemGetAllocationGranularity(self, properties: SimpleNamespace, kind: str) -> tuple[Status, int]:
        return _OK, UNIT

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return _OK, status.name.lower().encode()

    def cuMemAddressReserve(self, length: int, alignment: int, address: int, flags: int) -> tuple[Status, int]:
        found = self._libc.mmap(None, length, _NONE, _HOLE, -1, 0)
        self.reserved[found] = length
        return _OK, found

    def cuMemAddressFree(self, address: int, length: int) -> tuple[Status]:
        if self.reserved.get(address) != length or self._inside(address, length):
            return _INVALID
        del self.reserved[address]
        self._libc.munmap(address, length)
        return (_OK,)

    def cuMemCreate(self, length: int, properties: SimpleNamespace, flags: int) -> tuple[Status, int] | tuple[Status]:
        if sum(held for _, held in self.handles.values()) + length > self.capacity_bytes:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY,)
        fd = os.memfd_create("handle", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return _OK, self._add(fd, length)

    def cuMemRelease(self, handle: int) -> tuple[Status]:
        os.close(self.handles.pop(handle)[0])
        return (_OK,)

    def cuMemMap(self, address: int, length: int, offset: int, handle: int, flags: int) -> tuple[Status]:
        if self._inside(address, length) or offset + length > self.handles[handle][1]:
            return _INVALID
        self._libc.mmap(address, length, _NONE, mmap.MAP_SHARED | _FIXED, self.handles[handle][0], offset)
        self.mapped[address] = length
        return (_OK,)

    def cuMemSetAccess(self, address: int, length: int, access: list[SimpleNamespace], n: int) -> tuple[Status]:
        if sum(self.mapped[start] for start in self._inside(address, length)) != length:
            return _INVALID
        self._libc.mprotect(address, length, mmap.PROT_READ | mmap.PROT_WRITE)
        return (_OK,)

    def cuMemUnmap(self, address: int, length: int) -> tuple[Status]:
        leaving = self._inside(address, length)
        if sum(self.mapped[start] for start in leaving) != length or min(leaving) < address:
            return _INVALID
        for start in leaving:
            del self.mapped[start]
        self._libc.mmap(address, length, _NONE, _HOLE | _FIXED, -1, 0)
        return (_OK,)

    def cuMemExportToShareableHandle(self, handle: int, kind: str, flags: int) -> tuple[Status, int]:
        return _OK, os.dup(self.handles[handle][0])

    def cuMemImportFromShareableHandle(self, fd: int, kind: str) -> tuple[Status, int]:
        return _OK, self._add(os.dup(fd), os.fstat(fd).st_size)

    def _add(self, fd: int, length: int) -> int:
        self._next += 1
        self.handles[self._next] = (fd, length)
        return self._next

    def _inside(self, address: int, length: int) -> list[int]:
        """Mappings that touch a stretch."""
        return [start for start, held in self.mapped.items() if start < address + length and start + held > address]
