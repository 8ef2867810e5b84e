"""Page memory of a device and its guests in one process: all of our code, over a driver that is pretended."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages.liveness import Member
from kvstore.memory import cuda_driver, page_memory
from kvstore.memory.available import Available
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.cuda_vmm import CudaVmmBackend
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport import host
from kvstore.transport.cuda_pages import CudaMapper
from kvstore.transport.layer_events import NoLayerEvents
from kvstore.transport.own_pages import AcceleratorPages
from kvstore.transport.probe import Ways
from kvstore.transport.share import Share
from tests.kvstore.memory.pretended_driver import PretendedCuda, Status

MIB = 2**20
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
CPU = torch.device("cpu")
N_CHUNKS, CHUNKS_AT_ONCE = 50, 20
"""Three messages of descriptors; each chunk is one page."""


class PretendedDevice(PretendedCuda):
    """Pins memory too."""

    def __init__(self) -> None:
        super().__init__(2**33)
        self.pinned: dict[int, int] = {}  # address -> length

    def cuMemHostRegister(self, address: int, length: int, flags: int) -> tuple[Status]:
        self.pinned[address] = length
        return (Status.CUDA_SUCCESS,)

    def cuMemHostUnregister(self, address: int) -> tuple[Status]:
        return (Status.CUDA_SUCCESS if self.pinned.pop(address, 0) else Status.CUDA_ERROR_INVALID_VALUE,)


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    cuda = PretendedDevice()
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: cuda)
    monkeypatch.setattr(page_memory, "open_cuda", lambda device: CudaVmmBackend(CPU, CudaDriver(0)))
    monkeypatch.setattr(page_memory, "_free_memory", lambda device: Available(64 * MIB, "pretended"))
    monkeypatch.setattr(page_memory, "whole_memory_bytes", lambda device: 64 * MIB)
    monkeypatch.setattr(page_memory, "device_chunk_bytes", lambda budget_bytes: LAYOUT.page_bytes)
    monkeypatch.setattr(host, "MAX_FDS", CHUNKS_AT_ONCE)
    return cuda


class DeviceParty:
    """One worker with a device: its memory, its share, and what it heard of the ends of others."""

    def __init__(self, worker: str, incarnation: int, run_dir: Path, *, on_gone: Callable[[PeerId], None]) -> None:
        self.name = peer_id(WorkerId(worker), Incarnation(incarnation))
        self.memory: PageMemory = open_page_memory(N_CHUNKS * LAYOUT.page_bytes, LAYOUT, torch.device("cuda", 0))
        assert len(self.memory.pages.chunks) == N_CHUNKS
        self.rows[:] = torch.from_numpy(np.random.default_rng(incarnation).integers(0, 256, self.rows.shape, np.uint8))
        self.driver = CudaDriver(0)
        self.mapper = CudaMapper(self.driver, CPU)
        self.share = Share(self.name, on_joined=lambda peer: None, on_gone=on_gone, mapper=self.mapper)
        self.path = self.share.serve(self.memory, run_dir)
        self.own = AcceleratorPages(self.memory.pages, NoLayerEvents())
        self.member = Member(
            id=WorkerId(worker),
            role="decode",
            incarnation=Incarnation(incarnation),
            endpoint="",
            host="here",
            pid=os.getpid(),
            share_path=self.path,
            share_kind=self.memory.kind,
            device_uuid=self.memory.device_uuid,
        )

    @property
    def rows(self) -> torch.Tensor:
        pages = self.memory.pages.tensor
        return pages.view(torch.uint8).view(len(pages), -1)

    def ways(self, wanted: str = "auto") -> Ways:
        return Ways(self.own, self.share, wanted, self.driver)

    def close(self) -> None:
        self.share.close()
        self.memory.close()
        self.driver.close()
