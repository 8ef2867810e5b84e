"""The engine on a GPU: a step is queued whole, without waiting for the device, and its tokens are fetched later.

So the next step can be planned, filled in and queued while this one runs. Tokens that the next step needs and the host
does not know yet stay on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import ConfigError
from common.ids import RequestId
from kvstore.transport.layer_events import LayerEvents
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult, draws_on_host
from services.worker.engine.attention import LayerHooks
from services.worker.engine.batch import count_decodes
from services.worker.engine.engine import require_fitting
from services.worker.engine.fused.graphs import StepGraphs, decode_ladder, doubling_ladder
from services.worker.engine.fused.inputs import fill_rows, fill_sampling, pad_draws, pad_rows, pad_sequences
from services.worker.engine.fused.lane import Mark, open_lane
from services.worker.engine.fused.steps import NO_HOOKS, SHORT_KEYS, SHORT_SEQUENCES, Steps
from services.worker.engine.make import SHORT_TOKENS, EngineLimits
from services.worker.engine.rehearsal import long_steps
from services.worker.engine.sampling import sample
from services.worker.model.fused import FusedDecoder
from services.worker.model.load import LoadedModel

_LEAST_SHORT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was queued."""

    plan: StepPlan
    began: Mark
    ended: Mark
    tokens: Tensor
    """Of the plan's drawing segments, on the host once `ended` was waited for."""
    host_rows: tuple[int, ...]
    """Those of them for which the host draws instead."""
    logits: Tensor | None
    """[host rows, vocab]; None: there are none."""

    @property
    def done(self) -> bool:
        """Whether `collect` would return at once."""
        return self.ended.passed


class FusedEngine:
    """Runs plans on a fused model and a pool of pages. One thread calls it; at most two steps are on their way.

    `pages` [pages, block_tokens, 2, kv_heads, head_dim] may grow and shrink at its end between steps, in place.
    """

    def __init__(self, model: LoadedModel, pages: Tensor, limits: EngineLimits, marks: LayerEvents) -> None:
        """`marks` get one mark for each layer of a streamed step. Raises ConfigError if the pages do not fit the model."""
        require_fitting(model, pages, model.layout)
        assert isinstance(model.runner, FusedDecoder), "a model loaded for a GPU"
        self._marks, self._layout, self._limits = marks, model.layout, limits
        self._lane = lane = open_lane(model.device)
        self._steps = Steps(model.runner, pages, limits, self._layout.block_tokens, lane)
        self._drawn_row: dict[RequestId, int] = {}
        self._fetched = [lane.host_buffer(limits.max_running * 8).view(torch.int64) for _ in range(2)]
        self._turn = 0
        self._decode_graphs = StepGraphs(decode_ladder(limits.max_running), self._steps.decode_step)
        most_tokens = min(SHORT_TOKENS, limits.max_step_tokens)
        self._short_graphs = StepGraphs(doubling_ladder(_LEAST_SHORT_TOKENS, most_tokens), self._steps.short_step)

    def use_pages(self, pages: Tensor) -> None:
        """The pool was resized at its end: steps launched from now on use this view of it. Graphs know its address only."""
        self._steps.pages = pages

    def use_scratch(self, memory: Tensor) -> None:
        """Raises ConfigError: on a GPU steps take their tensors from torch's own memory, which graphs know by address."""
        raise ConfigError(
            f"{memory.numel()} bytes of scratch: steps cannot take them on a GPU; use --elastic off there"
        )

    @torch.inference_mode()
    def capture(self) -> int:
        """Make decode steps and short steps graphs; returns how many were captured.

        Call it once, before the first step: it writes into the pool's first block, which nobody may own yet.
        """
        self._lane.enter()
        try:
            for buffers in (self._steps.decode, self._steps.short):
                fields = buffers.next_host()
                pad_rows(fields, 0, buffers.rows)
                buffers.send()
            on_gpu = self._steps.pages.device.type == "cuda"
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            n_graphs = self._decode_graphs.capture(pool) + self._short_graphs.capture(pool)
        finally:
            self._lane.leave()
        for plan in long_steps(self._layout, SHORT_TOKENS, SHORT_KEYS, self._limits):
            self.step(plan)
        self._drawn_row = {}
        return n_graphs

    @torch.inference_mode()
    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
        await_layer: Callable[[int], None] | None = None,
        await_ring: Callable[[int], None] | None = None,
    ) -> Launched:
        """Queue every segment and the drawing of the tokens asked for.

        `await_layer(l)` is called before anything that reads pages of layer l is queued, if the plan has loads: it
        returns when they are there. `on_layer(l)` is called on this thread once the writing of K and V of layer l is
        queued, if a segment is streamed: whoever copies them orders its copy behind the lane's work. `await_ring(l)` is
        called before the writing of layer l is queued.
        """
        self._lane.enter()
        try:
            began = self._lane.mark()
            hooks = replace(self._hooks(plan, on_layer, await_layer), before_write=await_ring)
            self._queue(plan, hooks)
            drawing = [segment for segment in plan.segments if segment.sample]
            self._drawn_row = {segment.request: row for row, segment in enumerate(drawing)}
            host_rows = tuple(row for row, segment in enumerate(drawing) if draws_on_host(segment.sampling))
            tokens, logits = self._fetch(len(drawing)), self._keep_logits(host_rows)
            return Launched(plan, began, self._lane.mark(), tokens, host_rows, logits)
        finally:
            self._lane.leave()

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step; steps are collected in the order they were launched."""
        launched.ended.wait()
        plan, tokens = launched.plan, launched.tokens.tolist()
        drawing = [segment for segment in plan.segments if segment.sample]
        sampled = [Sampled(one.request, token, None) for one, token in zip(drawing, tokens, strict=True)]
        if launched.logits is not None:
            by_host = sample([drawing[row] for row in launched.host_rows], launched.logits.float())
            for row, one in zip(launched.host_rows, by_host, strict=True):
                sampled[row] = one
        return StepResult(plan.number, tuple(sampled), launched.ended.since_ms(launched.began))

    def step(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
        await_layer: Callable[[int], None] | None = None,
    ) -> StepResult:
        """`launch` and `collect`."""
        return self.collect(self.launch(plan, on_layer, await_layer))

    def _hooks(
        self, plan: StepPlan, on_layer: Callable[[int], None] | None, await_layer: Callable[[int], None] | None
    ) -> LayerHooks:
        streamed = on_layer is not None and any(segment.streamed for segment in plan.segments)

        def on_written(layer: int) -> None:
            assert on_layer is not None
            self._marks.record(layer)
            on_layer(layer)

        return LayerHooks(on_written=on_written if streamed else None, before_read=await_layer if plan.loads else None)

    def _queue(self, plan: StepPlan, hooks: LayerHooks) -> None:
        """Queue the step; its tokens are drawn on the device, also those that the host will draw again."""
        segments, steps = plan.segments, self._steps
        whole = all(segment.table.whole for segment in segments)
        if whole:
            steps.tables.update(segments)
        if whole and hooks == NO_HOOKS and (rows := self._decode_size(segments)) is not None:
            self._queue_decode(segments, rows)
        elif whole and (tokens := self._short_size(plan)) is not None:
            self._queue_short(segments, tokens, hooks)
        else:
            fields = steps.any.next_host()
            fill_rows(fields, segments, count_decodes(segments), self._drawn_row, self._layout.block_tokens)
            n_drawn = fill_sampling(fields, segments)
            steps.any.send()
            steps.any_step(segments, hooks, n_drawn, whole=whole)

    def _decode_size(self, segments: Sequence[Segment]) -> int | None:
        """The captured decode step that these segments fit into."""
        if all(segment.count == 1 and segment.sample for segment in segments):
            return self._decode_graphs.size_for(len(segments))
        return None

    def _short_size(self, plan: StepPlan) -> int | None:
        """The captured short step that the plan fits into."""
        fits = len(plan.segments) <= SHORT_SEQUENCES and all(
            segment.start + segment.count <= SHORT_KEYS for segment in plan.segments
        )
        return self._short_graphs.size_for(plan.n_tokens) if fits else None

    def _queue_decode(self, segments: Sequence[Segment], rows: int) -> None:
        buffers, count = self._steps.decode, len(segments)
        fields = buffers.next_host()
        fill_rows(fields, segments, count, self._drawn_row, self._layout.block_tokens)
        fill_sampling(fields, segments)
        pad_rows(fields, count, rows)
        pad_sequences(fields, count, count, rows)
        pad_draws(fields, count, rows)
        buffers.send()
        self._decode_graphs.replay(rows)

    def _queue_short(self, segments: Sequence[Segment], tokens: int, hooks: LayerHooks) -> None:
        """A graph is one piece: what is loaded must be there before it, and of its layers is told behind it."""
        buffers, count = self._steps.short, len(segments)
        fields = buffers.next_host()
        n_rows = fill_rows(fields, segments, 0, self._drawn_row, self._layout.block_tokens)
        n_drawn = fill_sampling(fields, segments)
        pad_rows(fields, n_rows, tokens)
        pad_sequences(fields, count, n_rows, SHORT_SEQUENCES)
        pad_draws(fields, n_drawn, SHORT_SEQUENCES)
        buffers.send()
        if hooks.before_read is not None:
            for layer in range(self._layout.layers):
                hooks.before_read(layer)
        self._short_graphs.replay(tokens)
        if hooks.on_written is not None:
            for layer in range(self._layout.layers):
                hooks.on_written(layer)

    def _fetch(self, n_drawn: int) -> Tensor:
        """Queue the copy of the drawn tokens to the host."""
        self._turn = 1 - self._turn
        fetched = self._fetched[self._turn][:n_drawn]
        if n_drawn:
            fetched.copy_(self._steps.drawn[:n_drawn], non_blocking=True)
        return fetched

    def _keep_logits(self, rows: tuple[int, ...]) -> Tensor | None:
        """Queue a copy of these rows' logits, which the next step overwrites."""
        if not rows:
            return None
        chosen = torch.tensor(rows, device=self._steps.logits.device)
        return self._steps.logits.index_select(0, chosen)
