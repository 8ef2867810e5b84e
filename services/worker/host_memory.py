"""The memory of a worker's host buffer: pages on the host, mapped as a peer's are, so that the block mover needs nothing new."""

import os

import torch

from common.errors import ConfigError, PeerFailed
from common.kv_layout import KvLayout
from common.log import Log
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.descriptions import PoolDescription
from kvstore.transport.offering import Offering
from kvstore.transport.pinned_mapping import PinnedMapping
from kvstore.transport.shared_pages import SharedPages
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.settings import WorkerSettings


def buffer_bytes(settings: WorkerSettings, page_memory_bytes: int) -> int:
    """How large the buffer shall be; 0: there shall be none. `page_memory_bytes`: of the device."""
    if settings.host_buffer_bytes is not None:
        return settings.host_buffer_bytes
    wanted = settings.layer_offload != "off" or settings.elastic == "full"
    return page_memory_bytes if wanted else 0


class HostMemory:
    """Owns the pages and a mapping of them. Opened and closed by one thread; nothing may be moved any more when it closes."""

    def __init__(self, n_bytes: int, layout: KvLayout) -> None:
        """Takes all of its memory now. Raises ConfigError if there is not so much, or if it does not hold one block."""
        try:
            self._memory: PageMemory = open_page_memory(n_bytes, layout)
        except ConfigError as error:  # it speaks of the flag of the memory that it opens elsewhere
            raise ConfigError(str(error).replace("--device-memory", "--host-buffer")) from error
        try:
            self.pages = _mapped(self._memory)
            """For `BlockMover.attach`."""
        except BaseException:
            self._memory.close()
            raise

    @property
    def n_pages(self) -> int:
        """Pages that have memory."""
        return self._memory.pages.n_pages

    @property
    def plan_text(self) -> str:
        """How the bytes divide, for the log."""
        return str(self._memory.plan)

    def pin(self, driver: CudaDriver, device: torch.device, log: Log) -> None:
        """Let the device copy to and from it by itself; if the system refuses, copies go through pinned buffers."""
        try:
            self.pages.pin(lambda pages: PinnedMapping(driver, pages, device))
        except PeerFailed as error:
            log.event("host_buffer_not_pinned", text=str(error))

    def close(self) -> None:
        """Unmap it and give it back."""
        self.pages.close()
        self._memory.close()


def _mapped(memory: PageMemory) -> SharedPages:
    offering = Offering(memory)
    description = offering.describe(HOST_BUFFER, 0, 0)
    assert isinstance(description, PoolDescription), "host memory is one file"
    (fd,) = offering.export_first()
    try:
        return SharedPages(description, fd)
    finally:
        os.close(fd)


def open_host_memory(
    settings: WorkerSettings, memory: PageMemory, driver: CudaDriver | None, log: Log
) -> HostMemory | None:
    """The buffer's memory, if there shall be one. `memory`: of the worker's pages. Raises ConfigError."""
    n_bytes = buffer_bytes(settings, memory.plan.chunks * memory.plan.chunk_bytes)
    if n_bytes == 0:
        return None
    host = HostMemory(n_bytes, memory.pages.layout)
    if driver is not None:
        host.pin(driver, memory.backend.device, log)
    log.event("host_buffer_planned", plan=host.plan_text)
    return host
