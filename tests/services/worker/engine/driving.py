"""A minimal scheduler for engine tests: hands out pages, cuts prompts into chunks, feeds tokens back."""

from dataclasses import dataclass, field

import numpy as np
import torch

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from kvstore.memory.page_pool import PagePool
from kvstore.memory.sequence_views import SequenceViews
from services.worker.core.plan import Sampled, Segment, StepPlan
from services.worker.engine.make import EngineLimits, make_engine
from services.worker.model.load import LoadedModel


@dataclass
class Sequence:
    """One request in a test."""

    tokens: list[int]
    output_tokens: int
    table: PageTable
    sampling: Sampling
    prompt_tokens: int
    computed: int = 0
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.sampled) == self.output_tokens


class Driver:
    """Runs sequences through an engine; every new one joins at the next step, whatever the others are doing."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        pages: int = 4096,
        garbage: float | None = None,
        whole_blocks: bool = False,
        shown: tuple[PagePool, SequenceViews] | None = None,
    ) -> None:
        layout = model.layout
        shape = (pages, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
        self.pool = torch.zeros(shape, dtype=model.dtype, device=model.device) if shown is None else shown[0].tensor
        pages = len(self.pool)
        if garbage is not None:
            self.pool.fill_(garbage)
        limits = EngineLimits(max_running=32, max_step_tokens=4096, context_tokens=model.identity.context_tokens)
        self.engine = make_engine(model, self.pool, limits, views=None if shown is None else shown[1])
        self.layout = layout
        # Scattered on purpose: neighbours in a sequence are not neighbours in memory, nor are the layers of a block
        # unless `whole_blocks`.
        order = np.random.default_rng(0).permutation(pages // layout.layers if whole_blocks else pages)
        if whole_blocks:
            order = (order[:, None] * layout.layers + np.arange(layout.layers)[::-1]).reshape(-1)
        self._free = [int(page) for page in order]
        self.sequences: dict[RequestId, Sequence] = {}
        self.steps = 0

    def add(self, prompt: list[int], output_tokens: int, **sampling: object) -> RequestId:
        request = RequestId(f"r{len(self.sequences)}")
        settings = Sampling(max_tokens=output_tokens, **sampling)  # type: ignore[arg-type]  # a test's keywords
        table = PageTable(self.layout.layers)
        self.sequences[request] = Sequence(list(prompt), output_tokens, table, settings, len(prompt))
        return request

    def step(self, chunk_tokens: int = 64, **kwargs: object) -> None:
        running = [(request, one) for request, one in self.sequences.items() if not one.done]
        segments = [self._segment(request, one, chunk_tokens) for request, one in running]
        segments.sort(key=lambda segment: segment.start < segment.prompt_tokens)  # decodes first
        result = self.engine.step(StepPlan(self.steps, tuple(segments)), **kwargs)  # type: ignore[arg-type]
        self.steps += 1
        for segment in segments:
            self.sequences[segment.request].computed += segment.count
        for one in result.sampled:
            self.sequences[one.request].tokens.append(one.token)
            self.sequences[one.request].sampled.append(one)

    def run(self, chunk_tokens: int = 64) -> None:
        while any(not one.done for one in self.sequences.values()):
            self.step(chunk_tokens)

    def output(self, request: RequestId) -> list[int]:
        return [one.token for one in self.sequences[request].sampled]

    def segment(self, request: RequestId, chunk_tokens: int) -> Segment:
        """The next tokens of a sequence."""
        return self._segment(request, self.sequences[request], chunk_tokens)

    def pending_segment(self, request: RequestId) -> Segment:
        """The token that the step before draws."""
        one = self.sequences[request]
        self._extend(one, one.computed + 1)
        return Segment(
            request=request,
            tokens=one.tokens,
            prompt_tokens=one.prompt_tokens,
            start=one.computed,
            count=1,
            table=one.table,
            sampling=one.sampling,
            sample=True,
            pending=True,
        )

    def _extend(self, one: Sequence, tokens: int) -> None:
        missing = self.layout.blocks_for(tokens) - one.table.n_blocks
        if missing > 0:
            pages = [self._free.pop() for _ in range(missing * self.layout.layers)]
            one.table.append(np.array(pages, np.int32).reshape(missing, self.layout.layers))

    def _segment(self, request: RequestId, one: Sequence, chunk_tokens: int) -> Segment:
        count = min(chunk_tokens, len(one.tokens) - one.computed)
        self._extend(one, one.computed + count)
        return Segment(
            request=request,
            tokens=one.tokens,
            prompt_tokens=one.prompt_tokens,
            start=one.computed,
            count=count,
            table=one.table,
            sampling=one.sampling,
            sample=one.computed + count == len(one.tokens),
            streamed=count > 1,
        )
