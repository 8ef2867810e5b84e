"""Builds the parts that every core of a worker is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from common.cost.step_cost import UNKNOWN_COST
from common.cost.step_fit import StepFit
from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.leases import HELD_GRACE_MS
from common.messages.liveness import Member
from common.policy.batching import DecodeFirst
from common.policy.elastic import ArenaTerms
from common.policy.eviction import EVICTION_POLICIES
from common.policy.layer_retention import retained_layers
from common.policy.spare import SpareMarks, SpareRule
from common.policy.transfer import AUTO, Granularity
from kvstore.index.block_pool import BlockPool
from kvstore.index.event_log import EventLog
from kvstore.index.ledger import Ledger
from services.worker.core.callers import Callers
from services.worker.core.calls import Calls
from services.worker.core.costing import Costing
from services.worker.core.elastic import ACTIVATIONS, ElasticScratch, OwnScratch
from services.worker.core.fetch_costs import FetchCosts
from services.worker.core.host_buffer import HostBuffer
from services.worker.core.kv_cache import CacheParts, KvCache
from services.worker.core.layer_rings import OffloadRule
from services.worker.core.lender import Lender
from services.worker.core.lookups import Lookups
from services.worker.core.memory_owners import Buffered, Lent, MemoryOwners
from services.worker.core.neighbours import Neighbours
from services.worker.core.offers import Offers
from services.worker.core.parking import Parking
from services.worker.core.parts import Parts
from services.worker.core.pool_memory import PoolMemory
from services.worker.core.prefetch import Prefetch
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.resizing import PoolSize, Resizing
from services.worker.core.restoring import Restoring
from services.worker.core.returns import Returns
from services.worker.core.scheduler import Scheduler
from services.worker.core.shared_prefix import SharedPrefixes
from services.worker.core.spare_memory import SYSTEM, SpareMemory
from services.worker.core.spill import Spiller
from services.worker.core.watchdog import WatchTerms
from services.worker.settings import WorkerSettings

_SPARE_PORTION_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}
"""In one turn of the loop, by kind of device: a processor clears memory as it comes."""
_LEAD_TOKENS = 8
"""Of a sequence that is read through a view, before its next block is needed: mapping takes less than so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a core is built over: memory, layout, and what is known of the engine."""

    size: PoolSize
    layout: KvLayout
    fit: StepFit | None = None
    """What is known of the engine's cost; None: nothing."""
    weight_bytes: int = 0
    """What the model takes beside the pool."""
    arena: ArenaTerms | None = None
    """What steps need of the pool's memory, unless --elastic is off."""
    own_scratch_bytes: Callable[[], int] = lambda: 0
    """What the engine keeps for steps beside the pool, at the moment; by default nothing."""


def kept(role: str, caching: int) -> Keep:
    """Which blocks a worker of that role keeps at a caching level (MemServe, section 5.2)."""
    if role == "decode":
        return Keep.ALL if caching >= 2 else Keep.NOTHING
    if role == "prefill" or caching < 2:
        return Keep.PROMPTS if caching >= 1 else Keep.NOTHING
    return Keep.ALL


def build_parts(mine: Member, settings: WorkerSettings, machine: Machine) -> Parts:
    """Raises ConfigError if scratch leaves nothing of the pool for KV."""
    size, layout, keep = machine.size, machine.layout, kept(mine.role, settings.caching)
    keeps, block_bytes = keep is not Keep.NOTHING, layout.layers * layout.page_bytes
    use_store = settings.kvstore == "auto" and keeps
    fit = machine.fit or StepFit(settings.step_tokens_limit)
    neighbours = Neighbours(
        mine,
        _dialled(mine.role, keeps=keeps, use_store=use_store),
        silent_ms=settings.silent_peer_ms,
        block_bytes=block_bytes,
    )
    pool = BlockPool(Ledger(size.n_pages), layout.layers, EVICTION_POLICIES[settings.eviction]())
    pool_memory = _pool_memory(pool, settings, machine)
    draws = mine.role != "prefill"  # a prefill worker's sequences grow no further
    lead_tokens = _LEAD_TOKENS if settings.kv_layout == "virtual" and draws else 0
    reuse = PrefixReuse(pool, keep, layout.block_tokens, pool_memory, lead_tokens=lead_tokens)
    policy = DecodeFirst(settings.step_tokens_limit, layout.block_tokens)
    scheduler = Scheduler(reuse, layout, policy, max_running=settings.running_limit, context_tokens=mine.takes_tokens)
    calls = Calls()
    parking = Parking(reuse, HostBuffer(size.host_pages, layout.layers, layout.page_bytes), calls)
    scheduler.park_in(parking, _offload_rule(mine, settings, machine, fit, parking))
    costs = FetchCosts(lambda: fit.cost, layout.block_tokens, always=settings.fetch == "always")
    cache_parts = CacheParts(
        pool=pool,
        events=EventLog("device"),
        prefetch=Prefetch(scheduler, Lookups(calls, costs, layout.layers), calls, costs, layout.layers),
        spiller=Spiller(pool, calls, settings.spill),
        lender=Lender(pool, block_bytes),
        returns=Returns(pool, calls, block_bytes, accepts=keeps),
        offers=Offers(calls, layout.block_tokens),
        costs=costs,
        restoring=Restoring(scheduler),
    )
    pool.listen(cache_parts.events)
    if use_store:
        pool.listen(cache_parts.spiller)
    callers = Callers(mine, silent_ms=settings.silent_peer_ms)
    resizing = Resizing(pool, size, worker=mine.id, block_tokens=layout.block_tokens, spare=pool_memory.spare)
    return Parts(
        pool=pool,
        reuse=reuse,
        scheduler=scheduler,
        callers=callers,
        neighbours=neighbours,
        cache=KvCache(cache_parts, neighbours, callers, use_store=use_store, fetches=keeps),
        costing=Costing(fit, pool, layout.block_tokens, keeps=keeps),
        shared=SharedPrefixes(pool, scheduler, layout.block_tokens, keeps=keeps),
        resizing=resizing,
        memory=MemoryOwners(
            pool,
            resizing,
            weight_bytes=machine.weight_bytes,
            lent=lambda: _lent(pool, machine),
            buffered=lambda: Buffered(parking.buffer.used_pages, parking.buffer.capacity_pages),
        ),
        pool_memory=pool_memory,
        watch=WatchTerms(stall_ms=settings.watchdog_ms, held_ms=settings.lease_ms + HELD_GRACE_MS),
    )


def _dialled(role: str, *, keeps: bool, use_store: bool) -> set[str]:
    """Roles of the processes that this one connects to."""
    dialled = {"decode"} if role == "prefill" else set[str]()
    if keeps and role != "decode":
        dialled.add(role)
    return dialled | ({"kvstore"} if use_store else set())


def _lent(pool: BlockPool, machine: Machine) -> Lent:
    chunk_pages = machine.size.chunk_pages
    activations, system = (len(pool.lent.of(owner)) * chunk_pages for owner in (ACTIVATIONS, SYSTEM))
    return Lent(activation_pages=activations, system_pages=system, scratch_bytes=machine.own_scratch_bytes())


def _pool_memory(pool: BlockPool, settings: WorkerSettings, machine: Machine) -> PoolMemory:
    spare, size = None, machine.size
    if settings.spare_memory == "release":
        rule = SpareRule(SpareMarks.of(size.n_pages // size.chunk_pages))
        portion_chunks = max(
            1, _SPARE_PORTION_BYTES[settings.device.partition(":")[0]] // (size.chunk_pages * size.page_bytes)
        )
        spare = SpareMemory(pool, rule, size.chunk_pages, portion_chunks)
    if settings.elastic == "off":
        return PoolMemory(OwnScratch(), spare)
    assert machine.arena is not None, "who lends memory to steps must know what they need"
    if spare is None:
        return PoolMemory(ElasticScratch(pool, machine.arena, settings.elastic))
    return PoolMemory(ElasticScratch(pool, machine.arena, settings.elastic, spare.recall_chunks), spare)


def _offload_rule(
    mine: Member, settings: WorkerSettings, machine: Machine, fit: StepFit, parking: Parking
) -> OffloadRule | None:
    """Which prompts are computed although not all of their layers fit.

    Where they are answered too, what leaves goes to the host buffer, as much as can be hidden; a prefill worker hands all of
    it over anyway. eLLM's elastic prefill is the same mechanism.
    """
    layout = machine.layout
    asked = "auto" if settings.elastic == "full" and settings.layer_offload == "off" else settings.layer_offload
    if isinstance(asked, int) and asked > layout.layers:
        raise ConfigError(f"--layer-offload={asked}: the model has {layout.layers} layers")
    # a processor takes a step of any length; an accelerator's engine is built for the longest one
    most_tokens = mine.takes_tokens if settings.device == "cpu" else settings.step_tokens_limit
    if mine.role == "prefill":
        return _stream_rule(asked, settings, layout, machine.arena, most_tokens)
    if asked == "off" or mine.role != "mixed":
        return None
    if not parking.buffer.capacity_pages:
        flag = f"--layer-offload={asked}" if settings.layer_offload != "off" else "--elastic=full"
        raise ConfigError(f"{flag} needs a host buffer; --host-buffer is 0")

    def retained(tokens: int) -> int:
        if isinstance(asked, int):
            return layout.layers - asked
        prefill_ms = (fit.cost or UNKNOWN_COST).exec_ms(tokens, 0)
        layer_bytes = layout.blocks_for(tokens) * layout.page_bytes
        return retained_layers(layout.layers, prefill_ms, layer_bytes, parking.bytes_per_s)

    return OffloadRule(retained, most_tokens)


def _stream_rule(
    asked: str | int, settings: WorkerSettings, layout: KvLayout, arena: ArenaTerms | None, most_tokens: int
) -> OffloadRule:
    """As `_offload_rule`, for a prefill worker: not for transfers that need all layers at the end."""
    stay = layout.layers - asked if isinstance(asked, int) else 0
    if asked == "off" or settings.transfer not in (AUTO, Granularity.LAYER):
        stay, most_tokens = layout.layers, 0

    def scratch_pages(tokens: int) -> int:
        if arena is None:
            return 0
        lent_chunks = arena.chunks_for(arena.step.needs_bytes(tokens, tokens)) - arena.lasting_chunks(settings.elastic)
        return max(0, lent_chunks) * arena.chunk_pages

    return OffloadRule(lambda _: stay, most_tokens, streams=True, scratch_pages=scratch_pages)
