"""A worker's page memory and all that is mapped onto it: the arena of steps, and the views of sequences."""

from collections.abc import Collection

import torch

from common.kv_layout import KvLayout
from common.net.fault_kit import FaultKit
from kvstore.memory.faulty import faulty_backend
from kvstore.memory.lending import ChunkLending
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.memory.sequence_views import SequenceViews
from services.worker.elastic_memory import require_spare_memory
from services.worker.engine.make import EngineLimits
from services.worker.settings import WorkerSettings

_SPARE_SLOTS = 8
"""Views beyond the sequences of a step: an ended one's stays for who goes on where it ended."""


class DeviceMemory:
    """Opened and closed as one, by the loop's thread. The block pool decides what is lent; this owns the memory."""

    def __init__(
        self,
        settings: WorkerSettings,
        n_bytes: int,
        layout: KvLayout,
        device: torch.device,
        limits: EngineLimits,
        faults: FaultKit | None = None,
    ) -> None:
        """`faults`: what mapping meets on purpose. Raises ConfigError."""
        virtual = settings.kv_layout == "virtual"
        self.pages: PageMemory = open_page_memory(
            n_bytes,
            layout,
            device,
            page_chunks=virtual,
            wrap=lambda backend: backend if faults is None else faulty_backend(backend, faults),
        )
        self.views: SequenceViews | None = None
        try:
            require_spare_memory(settings, self.pages.chunks)
            if virtual:
                self.views = SequenceViews(
                    self.pages.pages,
                    n_slots=limits.max_running + _SPARE_SLOTS,
                    context_blocks=layout.blocks_for(limits.context_tokens),
                    lock=self.pages.vm_lock,
                )
                self.pages.before_leaving = self.views.forget_from
            self.lending = ChunkLending(
                self.pages.pages, self.pages.chunks, self.pages.vm_lock, forget_pages=self._forget_pages
            )
        except BaseException:
            self._close_views_and_pages()
            raise

    def counters(self) -> dict[str, float]:
        """Of views, as in reports; none where sequences are read by table."""
        if self.views is None:
            return {}
        stats = self.views.stats()
        return {
            f"view_blocks_total{{how={how}}}": float(count)
            for how, count in (
                ("there", stats.hit_blocks),
                ("ahead", stats.mapped_ahead_blocks),
                ("waited", stats.waited_blocks),
            )
        }

    def check(self) -> None:
        """Raise VmMisuse if what is noted of views does not add up. Milliseconds."""
        if self.views is not None:
            self.views.check()

    def close(self) -> None:
        """Everything is invalid afterwards; nobody computes any more."""
        self.lending.close()
        self._close_views_and_pages()

    def _close_views_and_pages(self) -> None:
        if self.views is not None:
            self.views.close()
        self.pages.close()

    def _forget_pages(self, pages: Collection[int]) -> None:
        if self.views is not None:
            self.views.forget(pages)
