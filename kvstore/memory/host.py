"""The name under which callers know page memory on the host."""

import torch

from common.kv_layout import KvLayout
from kvstore.memory.page_memory import PageMemory, open_page_memory

HostMemory = PageMemory


def open_host_memory(budget_bytes: int, layout: KvLayout) -> PageMemory:
    """`open_page_memory` on the host."""
    return open_page_memory(budget_bytes, layout, torch.device("cpu"))
