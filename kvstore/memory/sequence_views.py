"""Contiguous KV of running sequences: address ranges that show a pool's pages in each sequence's own order.

Attention reads such a range as one plain tensor and needs no block table; sequences that share pages show the same
memory. What a view shows follows from the sequence's page table alone, so nothing else of the pool knows of views.
Sources: vTensor (arXiv 2407.15309), A2 to A5; eLLM (arXiv 2506.15155), 2.1 and 2.4: mapping ahead while a step computes,
unmapping later in batches.
"""

import threading
import time
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvstore.memory.backend import VmMisuse
from kvstore.memory.page_pool import PagePool
from kvstore.memory.view_mapper import ViewMapper
from kvstore.memory.view_slots import PageIds, ViewSlots

_LOOK_AGAIN_S = 1.0
_PAUSE_S = 0.0001
_JOIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewStats:
    """What views cost and spared; counted since the beginning unless it says now."""

    live_mappings: int
    """Pages that views show now, each as often as it is shown; stale ones are among them."""
    zombies: int
    """Pages mapped now that no sequence has any more."""
    mapped_calls: int
    unmapped_calls: int
    hit_blocks: int
    """Blocks that were there when they were to be shown, as all of the next three count them: all layers are one."""
    mapped_blocks: int
    mapped_ahead_blocks: int
    waited_blocks: int
    """Mapped while a step waited for it."""


class SequenceViews:
    """Owns one address range per slot and layer, and a thread that maps ahead and unmaps what is stale.

    One thread shows, begins and ends steps; any may ask ahead. Everything that uses the pool's back end holds `lock`;
    it is never held for longer than a batch of mappings, or what one step still needs.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        n_slots: int,
        context_blocks: int,
        lock: threading.Lock,
        max_mappings: int | None = None,
    ) -> None:
        """`context_blocks`: of the longest sequence. `max_mappings`: of the whole back end, the pages' own among them;
        None: as many as it bears.

        A few slots more than sequences that run at once keep what ended sequences showed for those that continue them.
        Raises VmMisuse unless each page is a chunk, ConfigError if there are no addresses for the ranges.
        """
        layout = pages.layout
        if pages.chunk_bytes != layout.page_bytes:
            raise VmMisuse(
                f"chunks of {pages.chunk_bytes} bytes hold several pages of {layout.page_bytes}; views need one in each: "
                "open the page memory with page_chunks"
            )
        self._layers, self._context_blocks = layout.layers, context_blocks
        self.token_elements = 2 * layout.kv_heads * layout.head_dim
        """Elements from one token to the next: K, then V."""
        most = pages.backend.max_mappings if max_mappings is None else max_mappings
        n_ranges = n_slots * layout.layers
        slots = ViewSlots(n_slots, layout.layers, context_blocks)
        self._mapper = ViewMapper(pages, slots, n_ranges, context_blocks, most)
        where = self._mapper.range
        self._tensor = pages.backend.bytes_at(where, where.length_bytes).view(getattr(torch, layout.dtype))
        context_tokens = context_blocks * layout.block_tokens
        self._range_elements = context_tokens * self.token_elements
        self._ranges = self._tensor.view(n_ranges, context_tokens, 2, layout.kv_heads, layout.head_dim)
        self._changed = threading.Condition(lock)
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="view-mapper", daemon=True)
        self._thread.start()

    # -- what is shown

    @property
    def tensor(self) -> Tensor:
        """All ranges one behind the other, flat, in the pages' dtype, on their device. Only what is shown may be read."""
        return self._tensor

    def start(self, slot: int, layer: int) -> int:
        """Element of `tensor` at which token 0 of a slot begins in a layer."""
        return (slot * self._layers + layer) * self._range_elements

    def keys_values(self, slot: int, layer: int, first_token: int, end_token: int) -> Tensor:
        """[tokens, 2 (K, V), kv_heads, head_dim], not copied."""
        return self._ranges[slot * self._layers + layer, first_token:end_token]

    def show(self, owner: Hashable, ids: PageIds) -> int | None:
        """Map what of these pages [layers, blocks] is not mapped right yet; returns the owner's slot.

        To be called once by each step that begins with this owner, which reads it until it ends. None: no slot or no mappings
        are left; the caller reads by its page table. Raises VmMisuse outside of such a step, and for more blocks than a slot
        has.
        """
        with self._changed:
            self._require_open()
            calls = self._mapper.counts.mapped_calls
            slot = self._mapper.show(owner, ids)
            if self._mapper.counts.mapped_calls != calls and self._mapper.has_work():
                self._changed.notify_all()
            return slot

    def ahead(self, owner: Hashable, ids: PageIds) -> None:
        """Have the background thread map these pages for the owner's next steps. What does not fit is left for `show`."""
        with self._changed:
            self._require_open()
            self._mapper.ask(owner, ids)
            self._changed.notify_all()

    def wait_ahead(self, timeout_s: float) -> bool:
        """Until the background thread has nothing left to do; False if it still has."""
        with self._changed:
            idle = self._changed.wait_for(lambda: self._failure is not None or not self._mapper.has_work(), timeout_s)
            self._require_open()
            return idle

    # -- steps

    def begin_step(self, owners: Iterable[Hashable]) -> None:
        """A step starts that reads what it is shown of these owners next."""
        with self._changed:
            self._mapper.slots.begin(owners)

    def end_step(self) -> None:
        """The oldest step in flight reads nothing more. Raises VmMisuse if there is none."""
        with self._changed:
            self._mapper.slots.fences.end()

    # -- memory that leaves

    def forget_from(self, first_page: int) -> None:
        """Pages from there on lose their memory next: unmap them wherever they are shown, and map none ahead.

        To be called without the lock, by the thread that shows, before the memory goes; nobody shows them in between.
        Raises VmMisuse if a step in flight reads one of them.
        """
        with self._changed:
            self._mapper.forget(lambda pages: pages >= first_page)

    def forget(self, pages: Collection[int]) -> None:
        """The same for single pages, whose memory goes or changes."""
        leaving = np.fromiter(pages, np.int32, len(pages))
        with self._changed:
            self._mapper.forget(lambda shown: np.isin(shown, leaving))

    def stats(self) -> ViewStats:
        """Of now."""
        with self._changed:
            counts, slots, layers = self._mapper.counts, self._mapper.slots, self._layers
            return ViewStats(
                live_mappings=slots.mapped_pages,
                zombies=slots.stale_pages,
                mapped_calls=counts.mapped_calls,
                unmapped_calls=counts.unmapped_calls,
                hit_blocks=counts.hit_pages // layers,
                mapped_blocks=(counts.waited_pages + counts.ahead_pages) // layers,
                mapped_ahead_blocks=counts.ahead_pages // layers,
                waited_blocks=counts.waited_pages // layers,
            )

    def check(self) -> None:
        """Raise VmMisuse if what is noted does not add up."""
        with self._changed:
            self._mapper.slots.check()

    def close(self) -> None:
        """Unmap everything; no view may be read any more. A second call changes nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_JOIN_S)
        with self._changed:
            self._tensor = self._ranges = torch.empty(0)
            self._mapper.close()

    def _require_open(self) -> None:
        if self._closed:
            raise VmMisuse("the views are closed")
        if self._failure is not None:
            raise VmMisuse("the thread that maps views has failed") from self._failure

    def _work(self) -> None:
        """The background thread: a batch at a time."""
        try:
            while self._work_once():
                time.sleep(_PAUSE_S)  # whoever waits for the lock gets it now; at once taken again, nobody would
        except BaseException as error:
            self._failure = error  # whoever shows next hears of it
            raise

    def _work_once(self) -> bool:
        """False: closed."""
        with self._changed:
            if not self._mapper.has_work():
                self._changed.notify_all()
                self._changed.wait(_LOOK_AGAIN_S)
            if not self._closed and self._mapper.has_work():
                self._mapper.work_some()
            return not self._closed
