"""Spans out of an accelerator's pages, and what happens when the accelerator has no room for the copy."""

from collections.abc import Sequence

import pytest
import torch

from common.errors import PeerFailed
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.device import DevicePages
from kvstore.transport.staged import StagedChannel

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


def pages() -> DevicePages:
    return DevicePages(4, LAYOUT, torch.device("cpu"))


def test_a_span_becomes_its_pages_one_after_the_other() -> None:
    source = pages()
    for page in range(4):
        source.write([page], bytes([page]) * LAYOUT.page_bytes)
    copied = StagedChannel(source).copy(KvSpan(0, 0, 2), [3, 1], [0, 1])
    assert (copied.n_copies, copied.n_bytes) == (2, 2 * LAYOUT.page_bytes)
    assert copied.payload == bytes([3]) * LAYOUT.page_bytes + bytes([1]) * LAYOUT.page_bytes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_a_copy_that_finds_no_memory_fails_alone(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def read(self: DevicePages, ids: Sequence[int]) -> bytearray:
        raise error

    monkeypatch.setattr(DevicePages, "read", read)
    with pytest.raises(PeerFailed, match="no memory to copy 1 pages of KvSpan"):
        StagedChannel(pages()).copy(KvSpan(0, 0, 1), [0], [0])
