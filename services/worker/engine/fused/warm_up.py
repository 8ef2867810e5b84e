"""Steps that nobody asked for, so that the first who asks need not wait for a compiler."""

import numpy as np

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.make import EngineLimits


def long_steps(
    layers: int, block_tokens: int, short_tokens: int, short_keys: int, limits: EngineLimits
) -> list[StepPlan]:
    """Steps too long for a graph, within the limits: many rows, and few rows behind many keys.

    All their blocks are the pool's first one, which nobody may own yet: what they write there means nothing.
    """
    shapes = [(0, short_tokens + 1), (short_keys, block_tokens + 1)]
    return [
        StepPlan(number, (_segment(layers, block_tokens, start, count),))
        for number, (start, count) in enumerate(shapes)
        if count <= limits.max_step_tokens and start + count < limits.context_tokens
    ]


def _segment(layers: int, block_tokens: int, start: int, count: int) -> Segment:
    table = PageTable(layers)
    blocks = -(-(start + count) // block_tokens)
    table.append(np.tile(np.arange(layers, dtype=np.int32), (blocks, 1)))
    return Segment(
        request=RequestId(""),
        tokens=[0] * (start + count),
        prompt_tokens=start + count,
        start=start,
        count=count,
        table=table,
        sampling=Sampling(max_tokens=1),
        sample=True,
    )
