"""The host buffer's memory: blocks go there and come back through the block mover, byte by byte."""

import queue
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.block_jobs import BlockEvent, BlockJobDone, FetchJob, StoreJob
from kvstore.transport.block_mover import BlockMover
from kvstore.transport.load_gate import LoadGate
from kvstore.transport.own_pages import own_pages_of
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.host_memory import HostMemory, buffer_bytes
from services.worker.settings import WorkerSettings

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=16, dtype="float32", block_tokens=16)
MIB = 2**20


def test_blocks_that_were_stored_come_back_into_other_pages_as_they_were() -> None:
    memory, host, events = (
        open_page_memory(2 * MIB, LAYOUT),
        HostMemory(2 * MIB, LAYOUT),
        queue.SimpleQueue[BlockEvent](),
    )
    mover = BlockMover(own_pages_of(memory.pages), LoadGate(), events.put)
    try:
        mover.attach(HOST_BUFFER, host.pages)
        pages = memory.pages.tensor
        pages[:8] = torch.rand(pages[:8].shape)
        own, back = np.arange(8, dtype=np.int32).reshape(4, 2), np.arange(20, 28, dtype=np.int32).reshape(4, 2)
        there = np.array([[9, 3], [0, 1], [host.n_pages - 1, 7], [40, 5]], np.int32)
        mover.post(StoreJob(1, HOST_BUFFER, own, there))
        assert done(events).ok
        expected = pages[:8].clone()
        pages[:8] = 0.0
        mover.post(FetchJob(2, HOST_BUFFER, back, there, float("inf"), by_layer=True))
        assert done(events).ok
        assert torch.equal(pages[20:28], expected)
    finally:
        mover.stop()
        host.close()
        memory.close()


def done(events: "queue.SimpleQueue[BlockEvent]") -> BlockJobDone:
    while not isinstance(event := events.get(timeout=10.0), BlockJobDone):
        pass
    return event


def test_a_buffer_that_holds_no_block_is_refused_by_the_name_of_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--host-buffer=.*does not hold 16 tokens"):
        HostMemory(1024, LAYOUT)


def test_there_is_a_buffer_if_it_is_asked_for_or_something_needs_one() -> None:
    plain = WorkerSettings(model="m")
    assert buffer_bytes(plain, 8 * MIB) == 0
    assert buffer_bytes(replace(plain, layer_offload=0), 8 * MIB) == 8 * MIB
    assert buffer_bytes(replace(plain, elastic="full"), 8 * MIB) == 8 * MIB
    assert buffer_bytes(replace(plain, elastic="full", host_buffer_bytes=0), 8 * MIB) == 0
    assert buffer_bytes(replace(plain, host_buffer_bytes=MIB), 8 * MIB) == MIB
