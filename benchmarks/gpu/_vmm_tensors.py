"""Ranges as torch tensors and under Triton kernels: partly mapped ones, and ones of device and host memory."""

import ctypes
from typing import TYPE_CHECKING

from benchmarks.gpu.table import Row
from common.errors import ServingError
from kvstore.memory.backend import VmMisuse
from kvstore.memory.cuda_driver import CudaDriver

if TYPE_CHECKING:  # torch takes seconds to import, and most of `vmm` needs none
    from torch import Tensor

_MIB = 2**20
_CHUNK_BYTES = 64 * _MIB
_CHUNKS = 4


def over_partly_mapped(quick: bool) -> list[Row]:
    """A bf16 tensor over four chunks of which one is mapped: by storage from a pointer, and by DLPack."""
    del quick
    import torch

    torch.cuda.init()
    driver = CudaDriver(0)
    address = driver.reserve(_CHUNKS * _CHUNK_BYTES)
    driver.map(address, _CHUNK_BYTES, driver.create(_CHUNK_BYTES))
    driver.allow(address, _CHUNK_BYTES)
    rows, keep = [], list[object]()
    for name, make in (("storage from pointer", _by_storage), ("DLPack", _by_dlpack)):
        raw = make(address, _CHUNKS * _CHUNK_BYTES, keep)
        values = raw.view(torch.bfloat16).view(_CHUNKS, -1)
        values[0].fill_(1.5)
        right = bool(values[0].float().mean().item() == 1.5) and raw.data_ptr() == address
        rows.append(
            Row(f"bf16 tensor over a partly mapped range, {name}", float(right), "works", None, str(raw.device))
        )
    driver.map(address + _CHUNK_BYTES, _CHUNK_BYTES, driver.create(_CHUNK_BYTES))
    driver.allow(address + _CHUNK_BYTES, _CHUNK_BYTES)
    values[1].fill_(2.5)
    right = bool(values[1].float().mean().item() == 2.5)
    rows.append(Row("the same tensor after another chunk was mapped", float(right), "works", None, ""))
    return rows


def _by_storage(address: int, length_bytes: int, keep: list[object]) -> "Tensor":
    import torch

    del keep
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cuda", 0), length_bytes)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (length_bytes,), (1,))


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset_bytes", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


def _by_dlpack(address: int, length_bytes: int, keep: list[object]) -> "Tensor":
    import torch

    shape, strides = (ctypes.c_int64 * 1)(length_bytes), (ctypes.c_int64 * 1)(1)
    managed = _Managed()
    managed.tensor = _Tensor(address, _Device(2, 0), 1, _Type(1, 8, 1), shape, strides, 0)
    keep += [shape, strides, managed]  # lives as long as the process: no deleter
    capsule_of = ctypes.pythonapi.PyCapsule_New
    capsule_of.restype, capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return torch.utils.dlpack.from_dlpack(capsule_of(ctypes.addressof(managed), b"dltensor", None))


def device_and_host(quick: bool) -> list[Row]:
    """A Triton kernel that copies from a range whose first half is device memory and whose second is the host's."""
    del quick
    import torch
    from triton.testing import do_bench

    from benchmarks.gpu._vmm_kernel import copy_kernel

    torch.cuda.init()
    driver = CudaDriver(0)
    node = max(0, driver.attribute("CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID"))
    address = driver.reserve(2 * _CHUNK_BYTES)
    try:
        driver.map(address, _CHUNK_BYTES, driver.create(_CHUNK_BYTES))
        host = driver.create(_CHUNK_BYTES, driver.properties(host_node=node))
        driver.map(address + _CHUNK_BYTES, _CHUNK_BYTES, host)
        driver.allow(address, 2 * _CHUNK_BYTES)
    except (ServingError, VmMisuse) as error:
        return [Row("device and host memory in one range", 0.0, "works", None, f"node {node}: {error}")]
    mixed = _by_storage(address, 2 * _CHUNK_BYTES, []).view(torch.int32)
    half = mixed.numel() // 2
    expected = torch.randint(-(2**31), 2**31 - 1, (mixed.numel(),), device="cuda", dtype=torch.int32)
    mixed.copy_(expected)
    out = torch.empty_like(expected)

    def copy(first: int, n: int) -> None:
        copy_kernel[(n // 4096,)](mixed[first:], out[first:], BLOCK=4096)

    copy(0, mixed.numel())
    right = bool(torch.equal(out, expected))
    rows = [Row("device and host memory in one range", float(right), "works", None, f"node {node}, one access call")]
    rates = []
    for name, first in (("device", 0), ("host", half)):
        taken_ms = float(do_bench(lambda f=first: copy(f, half), return_mode="median"))
        rates.append(_CHUNK_BYTES / taken_ms / 1e6)
        rows.append(Row(f"a kernel reads its {name} half", rates[-1], "GB/s", rates[-1] / rates[0], "its device half"))
    return rows
