"""The engine on a GPU: a step is queued whole, without waiting for the device, and its tokens are fetched later.

So the next step can be planned, filled in and queued while this one runs. Tokens that the next step needs and the host
does not know yet stay on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.ids import RequestId
from kernels.choose import choose_tokens
from kvstore.transport.layer_events import LayerEvents
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult, draws_on_host
from services.worker.engine.attention import LayerHooks
from services.worker.engine.batch import count_decodes
from services.worker.engine.engine import require_fitting
from services.worker.engine.fused.attention import PagedStep, StepPlaces, StepShape, step_shape
from services.worker.engine.fused.graphs import DecodeGraphs
from services.worker.engine.fused.inputs import StepBuffers, fill_rows, fill_sampling, pad_rows
from services.worker.engine.fused.lane import Mark, open_lane
from services.worker.engine.fused.tables import BlockTables, layer_slots, layer_tables
from services.worker.engine.make import EngineLimits
from services.worker.engine.sampling import sample
from services.worker.model.fused import FusedDecoder
from services.worker.model.load import LoadedModel

_NO_HOOKS = LayerHooks()


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was queued."""

    plan: StepPlan
    began: Mark
    ended: Mark
    tokens: Tensor | None
    """On the host once `ended` was waited for; None: the host draws them from `logits`."""
    logits: Tensor | None

    @property
    def done(self) -> bool:
        """Whether `collect` would return at once."""
        return self.ended.passed


class FusedEngine:
    """Runs plans on a fused model and a pool of pages. One thread calls it; at most two steps are on their way.

    `pages` [pages, 2, block_tokens, kv_heads, head_dim] may grow and shrink at its end between steps, in place.
    """

    def __init__(self, model: LoadedModel, pages: Tensor, limits: EngineLimits, marks: LayerEvents) -> None:
        """`marks` get one mark for each layer of a streamed step. Raises ConfigError if the pages do not fit the model."""
        layout = model.layout
        require_fitting(model, pages, layout)
        assert isinstance(model.runner, FusedDecoder), "a model loaded for a GPU"
        self._decoder, self._pages, self._block_tokens = model.runner, pages, layout.block_tokens
        self._marks = marks
        self._device = device = model.device
        self._lane = lane = open_lane(device)
        blocks = layout.blocks_for(limits.context_tokens)
        self._mixed = StepBuffers(limits.max_step_tokens + limits.max_running, device, lane)
        self._decode = StepBuffers(limits.max_running, device, lane)
        self._tables = BlockTables(limits.max_running, blocks, device, lane)
        self._drawn = torch.zeros(limits.max_running, dtype=torch.int64, device=device)
        self._drawn_row: dict[RequestId, int] = {}
        self._fetched = [lane.host_buffer(limits.max_running * 8).view(torch.int64) for _ in range(2)]
        self._turn = 0
        self._context_tokens = limits.context_tokens
        self._graphs = DecodeGraphs(limits.max_running, self._decode_rows)

    def use_pages(self, pages: Tensor) -> None:
        """The pool was resized at its end: steps launched from now on use this view of it. Graphs know its address only."""
        self._pages = pages

    @torch.inference_mode()
    def capture(self) -> int:
        """Make decode steps graphs; returns how many were captured, 0 where there are none (a CPU).

        Call it once, from the thread that will compute, before the first step.
        """
        if self._device.type != "cuda":
            return 0
        self._lane.enter()
        try:
            pad_rows(self._decode.next_host(), 0, self._decode.rows)
            self._decode.send()
            self._graphs.capture()
        finally:
            self._lane.leave()
        return len(self._graphs.sizes)

    @torch.inference_mode()
    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
        await_layer: Callable[[int], None] | None = None,
    ) -> Launched:
        """Queue every segment and the drawing of the tokens asked for.

        `await_layer(l)` is called before anything that reads pages of layer l is queued, if the plan has loads: it
        returns when they are there. `on_layer(l)` is called on this thread once the writing of K and V of layer l is
        queued, if a segment is streamed: whoever copies them orders its copy behind the lane's work.
        """
        self._lane.enter()
        try:
            began = self._lane.mark()
            logits = self._queue(plan, self._hooks(plan, on_layer, await_layer))
            tokens = self._fetch(len(self._drawn_row)) if logits is None else None
            return Launched(plan, began, self._lane.mark(), tokens, logits)
        finally:
            self._lane.leave()

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step; steps are collected in the order they were launched."""
        launched.ended.wait()
        plan = launched.plan
        sampling = [segment for segment in plan.segments if segment.sample]
        if launched.logits is not None:
            sampled = sample(sampling, launched.logits.float())
        elif launched.tokens is not None:
            drawn = launched.tokens.tolist()
            sampled = tuple(Sampled(one.request, token, None) for one, token in zip(sampling, drawn, strict=True))
        else:
            sampled = ()
        return StepResult(plan.number, sampled, launched.ended.since_ms(launched.began))

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

        return LayerHooks(on_written if streamed else None, await_layer if plan.loads else None)

    def _queue(self, plan: StepPlan, hooks: LayerHooks) -> Tensor | None:
        """Queue the step. The logits, if the host must draw from them; else the tokens are drawn on the device."""
        segments = plan.segments
        on_host = any(segment.sample and draws_on_host(segment.sampling) for segment in segments)
        whole = all(segment.table.whole for segment in segments)
        rows = None
        if hooks == _NO_HOOKS and whole and not on_host and all(one.count == 1 and one.sample for one in segments):
            rows = self._graphs.rows_for(len(segments))
        buffers = self._mixed if rows is None else self._decode
        fields = buffers.next_host()
        fill_rows(fields, segments, self._drawn_row, self._block_tokens)
        n_drawn = fill_sampling(fields, segments)
        if whole:
            self._tables.update(segments)
        if rows is not None:
            pad_rows(fields, len(segments), rows)
        buffers.send()
        logits = None
        if rows is not None:
            self._graphs.replay(rows)
        else:
            logits = self._queue_mixed(segments, self._places(segments, whole), hooks, n_drawn)
            if n_drawn and not on_host:
                self._draw(buffers.device, logits, n_drawn)
        known = () if on_host else (segment.request for segment in segments if segment.sample)
        self._drawn_row = {request: row for row, request in enumerate(known)}
        return logits if on_host else None

    def _places(self, segments: Sequence[Segment], whole: bool) -> StepPlaces:
        fields, count = self._mixed.device, len(segments)
        n_tokens = sum(segment.count for segment in segments)
        return StepPlaces(
            tables=self._tables.device[None, :count] if whole else layer_tables(segments, self._device),
            slots=fields["slots"][None, :n_tokens]
            if whole
            else layer_slots(segments, self._block_tokens, self._device),
            lengths=fields["lengths"][:count],
            query_starts=fields["query_starts"][: 1 + count - count_decodes(segments)],
        )

    def _queue_mixed(self, segments: Sequence[Segment], places: StepPlaces, hooks: LayerHooks, n_drawn: int) -> Tensor:
        """Any step, operator by operator; the logits of the rows to draw from."""
        fields, n_tokens = self._mixed.device, places.slots.shape[1]
        shape = step_shape(segments)
        attention = PagedStep(self._pages, shape, places, hooks)
        hidden = self._decoder.run(self._ids(fields, n_tokens), fields["positions"][:n_tokens], attention)
        return self._decoder.logits(hidden.index_select(0, fields["sample_rows"][:n_drawn]))

    def _decode_rows(self, rows: int) -> None:
        """A step of one token per sequence; the inputs are those of the decode buffers."""
        fields = self._decode.device
        shape = StepShape(decodes=rows, decode_keys=self._context_tokens)
        places = StepPlaces(
            tables=self._tables.device[None, :rows],
            slots=fields["slots"][None, :rows],
            lengths=fields["lengths"][:rows],
            query_starts=fields["query_starts"][:1],
        )
        attention = PagedStep(self._pages, shape, places, _NO_HOOKS)
        hidden = self._decoder.run(self._ids(fields, rows), fields["positions"][:rows], attention)
        self._draw(fields, self._decoder.logits(hidden), rows)

    def _ids(self, fields: dict[str, Tensor], rows: int) -> Tensor:
        pending = fields["pending"][:rows]
        return torch.where(pending < 0, fields["ids"][:rows], self._drawn[pending.clamp(min=0)])

    def _draw(self, fields: dict[str, Tensor], logits: Tensor, rows: int) -> None:
        tokens = choose_tokens(
            logits,
            fields["temperatures"][:rows],
            fields["top_k"][:rows],
            fields["top_p"][:rows],
            fields["min_p"][:rows],
            fields["chances"][:rows],
        )
        self._drawn[:rows].copy_(tokens)

    def _fetch(self, n_drawn: int) -> Tensor | None:
        """Queue the copy of the drawn tokens to the host."""
        if not n_drawn:
            return None
        self._turn = 1 - self._turn
        fetched = self._fetched[self._turn][:n_drawn]
        fetched.copy_(self._drawn[:n_drawn], non_blocking=True)
        return fetched
