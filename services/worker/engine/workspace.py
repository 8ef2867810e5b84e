"""How much memory is for KV pages, where only a share of all memory is given: what weights and steps leave of it.

On a GPU a share is of everything that the process takes there: weights, KV pages, the largest step's tensors, graphs,
and what CUDA keeps for itself. What steps need is measured, by computing the largest ones.
"""

import gc
from dataclasses import replace

import torch

from common.ids import RequestId
from common.kv_layout import KvLayout
from common.units import MIB, MemoryShare
from kvstore.memory.page_memory import whole_memory_bytes
from kvstore.memory.plan import kv_budget
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.make import SHORT_TOKENS, EngineLimits, make_engine
from services.worker.engine.rehearsal import rehearsed
from services.worker.model.load import LoadedModel

_CONTEXT_BYTES = 1024 * MIB
"""CUDA's context, its libraries and compiled kernels, none of which torch counts, and the scratch that peers probe. On an
H200 they were 916 MiB."""


def page_bytes_of(
    asked: MemoryShare | int, device: torch.device, model: LoadedModel | None, limits: EngineLimits
) -> int:
    """Bytes for KV pages. `model`: loaded already, as `needs_model` tells. Raises ConfigError if nothing is left."""
    if not isinstance(asked, MemoryShare):
        return asked
    total_bytes = whole_memory_bytes(device)
    if not needs_model(asked, device):
        return asked.of(total_bytes)
    assert model is not None, "what a model takes is known once it is loaded"
    torch.cuda.empty_cache()
    weights_bytes = torch.cuda.memory_reserved(device)
    return kv_budget(total_bytes, asked, weights_bytes, workspace_bytes(model, limits))


def needs_model(asked: MemoryShare | int, device: torch.device) -> bool:
    """Whether the model must be loaded before it is known how much is for pages."""
    return isinstance(asked, MemoryShare) and device.type == "cuda"


def workspace_bytes(model: LoadedModel, limits: EngineLimits) -> int:
    """What the largest steps take of a CUDA device beside weights and pages. Computes them; leaves nothing behind."""
    device, layout = model.device, model.layout
    before_bytes = torch.cuda.memory_reserved(device)
    shape = (layout.layers, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    engine = make_engine(model, torch.zeros(shape, dtype=model.dtype, device=device), limits)
    prefill, decode = largest_steps(layout, limits)
    short_tokens = min(SHORT_TOKENS, limits.max_step_tokens, limits.context_tokens)
    short = StepPlan(3, (rehearsed(layout, "short", 0, short_tokens),))
    engine.step(prefill)
    # Graphs have a pool of their own, as large as what the largest of them needs.
    in_graphs_bytes = 0
    for plan in (decode, short):
        torch.cuda.synchronize(device)
        idle_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        engine.step(plan)
        in_graphs_bytes = max(in_graphs_bytes, torch.cuda.max_memory_allocated(device) - idle_bytes)
    all_bytes = torch.cuda.memory_reserved(device)  # torch keeps what it once had
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return all_bytes - before_bytes + in_graphs_bytes + _CONTEXT_BYTES


def largest_steps(layout: KvLayout, limits: EngineLimits) -> tuple[StepPlan, StepPlan]:
    """As many prompt rows as a step may have, and as many sequences of full length as may draw; all in one block's pages."""
    prompts, left = list[Segment](), limits.max_step_tokens
    while left and len(prompts) < limits.max_running:
        count = min(left, limits.context_tokens)
        prompts.append(rehearsed(layout, f"prompt-{len(prompts)}", 0, count))
        left -= count
    one = rehearsed(layout, "draw", limits.context_tokens - 1, 1)
    draws = [replace(one, request=RequestId(f"draw-{number}")) for number in range(limits.max_running)]
    return StepPlan(1, tuple(prompts)), StepPlan(2, tuple(draws))
