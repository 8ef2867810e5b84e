"""What is for KV pages where a share of all memory is given."""

import pytest
import torch

from common.kv_layout import KvLayout
from common.units import GIB, MIB, MemoryShare
from services.worker.engine import workspace
from services.worker.engine.engine import TorchEngine
from services.worker.engine.make import EngineLimits
from services.worker.engine.workspace import largest_steps, needs_model, page_bytes_of, workspace_bytes
from services.worker.model.load import load_model
from tests.services.worker.engine.test_engine import Checkpoints

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIMITS = EngineLimits(max_running=5, max_step_tokens=100, context_tokens=40)
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32")


def test_a_size_is_taken_as_it_is_and_a_share_is_of_what_the_host_has_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workspace, "whole_memory_bytes", lambda device: 8 * GIB)
    assert page_bytes_of(3 * MIB, CUDA, None, LIMITS) == 3 * MIB
    assert page_bytes_of(MemoryShare(25), CPU, None, LIMITS) == 2 * GIB


def test_only_a_share_of_a_device_needs_the_model_first() -> None:
    assert needs_model(MemoryShare(25), CUDA)
    assert not needs_model(MemoryShare(25), CPU) and not needs_model(GIB, CUDA)


def test_the_largest_steps_are_as_large_as_the_limits_allow() -> None:
    prefill, decode = largest_steps(LAYOUT, LIMITS)
    assert [segment.count for segment in prefill.segments] == [40, 40, 20]
    assert [segment.start + segment.count for segment in decode.segments] == [40] * 5
    assert len({segment.request for segment in (*prefill.segments, *decode.segments)}) == 8


def test_the_largest_steps_can_be_computed_in_the_pages_of_one_block(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("llama"))
    layout = model.layout
    pages = torch.zeros(layout.layers, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    engine = TorchEngine(model, pages, layout)
    drawn = [len(engine.step(plan).sampled) for plan in largest_steps(layout, LIMITS)]
    assert drawn == [3, 5]


@pytest.mark.gpu
def test_measuring_the_workspace_leaves_nothing_behind(checkpoint: Checkpoints) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = load_model(checkpoint("qwen3"), device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    small = workspace_bytes(model, LIMITS)
    large = workspace_bytes(model, EngineLimits(max_running=64, max_step_tokens=8192, context_tokens=1024))
    assert 640 * MIB < small < large < 8 * GIB
    assert torch.cuda.memory_reserved() <= before + 64 * MIB
