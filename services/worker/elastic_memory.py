"""What of a worker's page memory may serve something else: planned from its settings, its engine and its pool."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from common.errors import ConfigError
from common.policy.elastic import ArenaTerms, StepBytes
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.page_memory import PageMemory
from services.worker.settings import WorkerSettings

_TILE_ROWS = 256
"""Rows that an engine computes at once; a smaller arena would have it compute less than that with each weight it reads."""


@runtime_checkable
class ScratchEngine(Protocol):
    """An engine that takes what grows with its steps from memory that it is given."""

    @property
    def scratch_terms(self) -> StepBytes:
        """How much that is."""
        ...

    def use_scratch(self, memory: Tensor) -> None:
        """From the next step on, take it from here."""
        ...


@runtime_checkable
class _OwnScratch(Protocol):
    """An engine that knows what it keeps for steps."""

    @property
    def own_scratch_bytes(self) -> int:
        """Beside the pool."""
        ...


def own_scratch_bytes(engine: object) -> int:
    """What an engine keeps for its steps beside the pool, now; 0 for one that leaves that to its device's allocator."""
    return engine.own_scratch_bytes if isinstance(engine, _OwnScratch) else 0


def arena_terms(engine: object, settings: WorkerSettings, memory: PageMemory, context_tokens: int) -> ArenaTerms | None:
    """What the arena is planned from; None with --elastic=off. Raises ConfigError for an engine that cannot have one."""
    if settings.elastic == "off":
        return None
    if not isinstance(engine, ScratchEngine):
        raise ConfigError(
            f"--elastic={settings.elastic}: the engine for --device={settings.device} has memory of its own for steps, "
            "laid out when it starts; --elastic must be off there"
        )
    plan = memory.plan
    return ArenaTerms(
        step=engine.scratch_terms,
        chunk_bytes=plan.chunk_bytes,
        chunk_pages=plan.chunk_bytes // plan.page_bytes,
        max_rows=settings.step_tokens_limit,
        least_rows=max(_TILE_ROWS, settings.running_limit + memory.pages.layout.block_tokens),
        max_keys=min(context_tokens, plan.tokens),
    )


def require_spare_memory(settings: WorkerSettings, chunks: ChunkPool) -> None:
    """Raise ConfigError if memory shall go to the system that could come back only as other chunks."""
    if settings.spare_memory == "release" and not chunks.can_vacate:
        raise ConfigError(
            f"--spare-memory=release does not work with --device={settings.device}: memory that comes back there is other "
            "chunks, and who maps ours would not know; --spare-memory must be keep"
        )
