"""KV pages in an accelerator's own memory: one plain tensor under the same budget and plan as on the host.

No other process maps it, so KV comes and goes by way of host memory, over tcp. Sharing it directly takes CUDA virtual
memory, which has its own back end behind the same protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.units import format_bytes
from kvstore.memory.plan import HOST_CHUNK_BYTES, MemoryPlan, memory_plan

_GRANULARITY_BYTES = 2 * 2**20  # what CUDA maps at a time


class DevicePages:
    """Pages [page, 2, block_tokens, kv_heads, head_dim] on one device. Any thread may read and write whole pages."""

    def __init__(self, n_pages: int, layout: KvLayout, device: torch.device) -> None:
        """Takes the memory now. Raises ConfigError if the device has less."""
        self.layout, self.n_pages = layout, n_pages
        shape = (n_pages, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
        try:
            self.tensor: Tensor = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
        except RuntimeError as error:  # torch's out of memory among them
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--device-memory={format_bytes(n_pages * layout.page_bytes)} cannot be taken on {device}: {reason}"
            ) from error

    def _rows(self) -> Tensor:
        return self.tensor.view(torch.uint8).view(self.n_pages, self.layout.page_bytes)

    def read(self, pages: Sequence[int]) -> bytearray:
        """The bytes of these pages, one after the other. Raises IndexError."""
        ids = self._ids(pages)
        return bytearray(self._rows().index_select(0, ids).cpu().numpy().data)

    def write(self, pages: Sequence[int], payload: bytes | bytearray | memoryview) -> None:
        """Write one payload into these pages; it is there for every stream when this returns.

        Raises IndexError, ValueError (another length than the pages').
        """
        ids = self._ids(pages)
        source = np.frombuffer(payload, np.uint8).reshape(len(pages), self.layout.page_bytes)
        self._rows().index_copy_(0, ids, torch.from_numpy(source.copy()).to(self.tensor.device))
        if self.tensor.device.type == "cuda":
            torch.cuda.synchronize(self.tensor.device)

    def _ids(self, pages: Sequence[int]) -> Tensor:
        if pages and not 0 <= min(pages) <= max(pages) < self.n_pages:
            raise IndexError(f"pages {min(pages)} to {max(pages)} of {self.n_pages}")
        return torch.tensor(list(pages), dtype=torch.int64, device=self.tensor.device)

    def close(self) -> None:
        """Give the memory back. Every view taken is invalid afterwards."""
        self.tensor, self.n_pages = torch.empty(0), 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Everything that `--device-memory` stands for on an accelerator. The process that opened it closes it."""

    pages: DevicePages
    plan: MemoryPlan

    def close(self) -> None:
        """Give back all memory."""
        self.pages.close()


def open_device_memory(budget_bytes: int, layout: KvLayout, device: torch.device) -> DeviceMemory:
    """A page pool that fills its whole budget on `device` now. Raises ConfigError."""
    plan = memory_plan(budget_bytes, layout, _GRANULARITY_BYTES, HOST_CHUNK_BYTES)
    return DeviceMemory(DevicePages(plan.pages, layout, device), plan)
