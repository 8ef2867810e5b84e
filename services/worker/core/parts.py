"""The parts that every worker is made of."""

from dataclasses import dataclass

from kvstore.index.block_pool import BlockPool
from services.worker.core.callers import Callers
from services.worker.core.costing import Costing
from services.worker.core.kv_cache import KvCache
from services.worker.core.memory_owners import MemoryOwners
from services.worker.core.neighbours import Neighbours
from services.worker.core.pool_memory import NOTHING_LENT, PoolMemory
from services.worker.core.prefix import PrefixReuse
from services.worker.core.resizing import Resizing
from services.worker.core.scheduler import Scheduler
from services.worker.core.shared_prefix import SharedPrefixes
from services.worker.core.watchdog import USUAL_WATCH, WatchTerms


@dataclass(frozen=True, slots=True)
class Parts:
    """Each part owns its own state."""

    pool: BlockPool
    reuse: PrefixReuse
    scheduler: Scheduler
    callers: Callers
    neighbours: Neighbours
    cache: KvCache
    costing: Costing
    shared: SharedPrefixes
    resizing: Resizing
    memory: MemoryOwners
    """Who has it, for reports."""
    pool_memory: PoolMemory = NOTHING_LENT
    watch: WatchTerms = USUAL_WATCH
    """When its watchdog fires."""
