"""Steps that nobody asked for: for measuring what steps take, and so that the first who asks need not wait for a compiler.

All their blocks are the pool's first one, which nobody may own yet: what they write there means nothing.
"""

import numpy as np

from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.make import EngineLimits


def rehearsed(layout: KvLayout, name: str, start: int, count: int) -> Segment:
    """`count` tokens behind `start` others, and one drawn at random."""
    table = PageTable(layout.layers)
    blocks = layout.blocks_for(start + count)
    table.append(np.tile(np.arange(layout.layers, dtype=np.int32), (blocks, 1)))
    sampling = Sampling(max_tokens=1, temperature=1.0)
    tokens = [0] * (start + count)
    return Segment(RequestId(name), tokens, len(tokens), start, count, table, sampling, sample=True)


def long_steps(layout: KvLayout, short_tokens: int, short_keys: int, limits: EngineLimits) -> list[StepPlan]:
    """Steps too long for a graph, as far as the limits allow: many rows, and few rows behind many keys."""
    shapes = [(0, short_tokens + 1), (short_keys, layout.block_tokens + 1)]
    return [
        StepPlan(number, (rehearsed(layout, "long", start, count),))
        for number, (start, count) in enumerate(shapes)
        if count <= limits.max_step_tokens and start + count < limits.context_tokens
    ]
