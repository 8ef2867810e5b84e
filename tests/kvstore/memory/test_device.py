"""Device pages: bytes in, the same bytes out, and nothing outside the pages that were named."""

import pytest
import torch

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.device import DevicePages, open_device_memory
from kvstore.transport.staged import StagedChannel

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="bfloat16", block_tokens=4)


def pages() -> DevicePages:
    made = DevicePages(6, LAYOUT, torch.device("cpu"))
    made.tensor.copy_(torch.randn(made.tensor.shape).to(torch.bfloat16))
    return made


def test_what_is_read_from_one_pool_and_written_to_another_is_the_same_kv() -> None:
    source, target = pages(), pages()
    before = target.tensor.clone()
    payload = StagedChannel(source).copy(KvSpan(0, 0, 3), [5, 0, 2], [1, 4, 3]).payload
    target.write([1, 4, 3], payload)
    assert torch.equal(target.tensor[[1, 4, 3]], source.tensor[[5, 0, 2]])
    assert torch.equal(target.tensor[[0, 2, 5]], before[[0, 2, 5]])


def test_pages_outside_the_pool_are_refused() -> None:
    with pytest.raises(IndexError):
        pages().read([6])
    with pytest.raises(IndexError):
        pages().write([-1], bytes(LAYOUT.page_bytes))


def test_a_payload_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        pages().write([0, 1], bytes(LAYOUT.page_bytes))


def test_the_budget_is_the_plan_and_nothing_more() -> None:
    memory = open_device_memory(5 * 2**20, LAYOUT, torch.device("cpu"))
    taken_bytes = memory.pages.tensor.numel() * memory.pages.tensor.element_size()
    assert taken_bytes == memory.plan.pages * LAYOUT.page_bytes <= 5 * 2**20
    memory.close()


def test_a_budget_beyond_the_device_is_refused_with_the_setting() -> None:
    with pytest.raises(ConfigError, match="--device-memory"):
        open_device_memory(2**60, LAYOUT, torch.device("cpu"))
