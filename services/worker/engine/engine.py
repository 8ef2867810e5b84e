"""The engine: one forward pass per call, over whatever segments the plan names."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.ids import RequestId
from common.kv_layout import KvLayout
from kernels.pages import PageViews
from kvstore.memory.sequence_views import SequenceViews
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult
from services.worker.core.scratch_terms import ScratchTerms
from services.worker.engine.attention import LayerHooks, PagedAttention
from services.worker.engine.batch import build_batch
from services.worker.engine.kv_reads import KvReads, PagedReads
from services.worker.engine.sampling import sample
from services.worker.engine.scratch import ALIGNMENT_BYTES, ArenaScratch, GrowingScratch
from services.worker.engine.spans import GROUP_KEYS
from services.worker.engine.view_reads import ViewReads, shown
from services.worker.model.load import LoadedModel
from services.worker.model.tiled import TiledDecoder

DRAWN_ROWS = 64
"""Sequences that draw at once: a vocabulary of floats for each is more than all else that a row needs."""


def require_fitting(model: LoadedModel, pages: Tensor, layout: KvLayout) -> None:
    """Raise ConfigError unless the pages are of the model's shape, dtype and device."""
    expected = (layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    if layout != model.layout or pages.shape[1:] != expected or pages.dtype != model.dtype:
        raise ConfigError(
            f"pages {list(pages.shape)} {pages.dtype} with {layout} do not fit {model.identity.name}, "
            f"which needs {model.layout}"
        )
    if pages.device.type != model.device.type:
        raise ConfigError(f"pages lie on {pages.device}, the model on {model.device}")


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was computed while it was launched."""

    result: StepResult
    done: bool = True


class TorchEngine:
    """Runs plans on a model and a pool of pages. Of a step it keeps the tokens it drew; one thread may call it.

    `pages` [pages, block_tokens, 2, kv_heads, head_dim] belongs to the caller; the engine writes the pages that a
    plan's tables name for the tokens it computes, and reads those before them.
    """

    def __init__(self, model: LoadedModel, pages: Tensor, layout: KvLayout, views: SequenceViews | None = None) -> None:
        """With `views` of the same pages, sequences are read where those show them. Raises ConfigError if the pages do not
        fit the model.
        """
        require_fitting(model, pages, layout)
        assert isinstance(model.runner, TiledDecoder), "a model loaded for this engine"
        self._runner = model.runner
        self._model = model
        self._pages, self._views = PageViews(pages), views
        self._block_tokens = layout.block_tokens
        self._drawn: dict[RequestId, int] = {}
        self._scratch: ArenaScratch | GrowingScratch = GrowingScratch(model.device)
        self.scratch_terms = scratch_terms(self._runner, self._pages, model.compute_dtype, by_view=views is not None)
        """What a step takes of the scratch."""

    def use_pages(self, pages: Tensor) -> None:
        """The pool was resized at its end: steps launched from now on use this view of it."""
        self._pages = PageViews(pages)

    def use_scratch(self, memory: Tensor) -> None:
        """Steps launched from now on take their tensors from `memory` [n] uint8, which must hold what they need.

        Until the first call the engine has memory of its own for that.
        """
        if isinstance(self._scratch, ArenaScratch):
            self._scratch.use(memory)
        else:
            self._scratch = ArenaScratch(memory)

    @property
    def own_scratch_bytes(self) -> int:
        """Memory of its own that is kept between steps. Any thread may ask."""
        scratch = self._scratch
        return 0 if isinstance(scratch, ArenaScratch) else scratch.held_bytes

    @property
    def scratch_peak_bytes(self) -> int:
        """The most that the last step took at once."""
        return self._scratch.peak_bytes

    def capture(self) -> int:
        """Nothing is prepared ahead of steps on a CPU: 0 graphs."""
        return 0

    def step(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
        await_layer: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Launch and collect in one."""
        return self.collect(self.launch(plan, on_layer, await_layer))

    def collect(self, launched: Computed) -> StepResult:
        """What came of a launch."""
        return launched.result

    @torch.inference_mode()
    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
        await_ring: Callable[[int], None] | None = None,
    ) -> Computed:
        """Compute every segment and draw the tokens asked for.

        `await_layer(l)` is called before layer l reads any page, if the plan has loads: it returns when theirs are there.
        `await_ring(l)` is called before layer l writes any: it returns when it may.

        `on_layer(l)` is called on this thread, for every layer in order, once K and V of layer l of all segments are
        in the pages and before layer l + 1 starts; only if a segment is `streamed`.
        """
        started_s = time.perf_counter()
        model = self._model
        batch = build_batch(plan, self._block_tokens, model.device, self._drawn)
        streamed = any(segment.streamed for segment in plan.segments)
        announce = on_layer if streamed else None
        hooks = LayerHooks(
            before_write=await_ring, on_written=announce, before_read=await_layer if plan.loads else None
        )
        with self._scratch.frame(), self._reads(plan.segments) as reads:
            attention = PagedAttention(batch, self._pages, reads, hooks, self._scratch)
            hidden = self._runner.run(batch.ids, batch.positions, attention, self._scratch)
            rows = hidden.index_select(0, batch.sample_rows)
        longest_keys = max(segment.start + segment.count for segment in plan.segments)
        needed_bytes = self.scratch_terms.needs_bytes(plan.n_tokens, longest_keys)
        assert self._scratch.peak_bytes <= needed_bytes, (
            f"a step took {self._scratch.peak_bytes} of {needed_bytes} bytes"
        )
        sampled = self._draw([segment for segment in plan.segments if segment.sample], rows)
        self._drawn = {one.request: one.token for one in sampled}
        return Computed(StepResult(plan.number, sampled, (time.perf_counter() - started_s) * 1e3))

    def _draw(self, drawing: list[Segment], hidden: Tensor) -> tuple[Sampled, ...]:
        """A token for each; as many rows' logits exist at once as DRAWN_ROWS."""
        drawn: list[Sampled] = []
        for first in range(0, len(drawing), DRAWN_ROWS):
            rows = slice(first, first + DRAWN_ROWS)
            drawn += sample(drawing[rows], self._runner.logits(hidden[rows]))
        return tuple(drawn)

    @contextmanager
    def _reads(self, segments: Sequence[Segment]) -> Iterator[KvReads]:
        """How this step finds the K and V of its sequences."""
        terms = self.scratch_terms
        paged = PagedReads(self._pages, self._model.compute_dtype, self._scratch, group_keys=terms.group_keys)
        if self._views is None:
            yield paged
            return
        with shown(self._views, segments, self._block_tokens) as slots:
            yield ViewReads(self._views, slots, paged)


def scratch_terms(decoder: TiledDecoder, pages: PageViews, dtype: torch.dtype, *, by_view: bool) -> ScratchTerms:
    """Of an engine that computes in `dtype`. Gathered are K and V as the pages have them, and as they are computed with.

    `by_view`: sequences are read where they are shown, and only one that is not is gathered, by itself; groups that are
    shown are copied only into another dtype.
    """
    copied_bytes = pages.dtype.itemsize + (0 if dtype is pages.dtype else dtype.itemsize)
    n_taken = decoder.n_taken + 2  # at the most two for gathered keys
    return ScratchTerms(
        fixed_bytes=n_taken * ALIGNMENT_BYTES,
        row_bytes=decoder.row_bytes,
        key_bytes=2 * pages.kv_heads * pages.head_dim * copied_bytes,
        block_tokens=pages.block_tokens,
        group_keys=0 if by_view and dtype is pages.dtype else GROUP_KEYS,
    )
