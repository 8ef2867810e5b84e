"""Builds the pure half of a worker: the core of its role and the parts it is made of."""

from common.block_hash import root_hash
from common.cost.step_cost import UNKNOWN_COST
from common.cost.step_fit import StepFit
from common.kv_layout import KvLayout
from common.messages.liveness import Member
from common.policy.batching import DecodeFirst
from common.policy.elastic import ArenaTerms
from common.policy.eviction import EVICTION_POLICIES
from common.policy.layer_retention import retained_layers
from common.policy.spare import SpareMarks, SpareRule
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from kvstore.index.block_pool import BlockPool
from kvstore.index.event_log import EventLog
from kvstore.index.ledger import Ledger
from services.worker.core.callers import Callers
from services.worker.core.calls import Calls
from services.worker.core.costing import Costing
from services.worker.core.decode import DecodeCore, DecodeTerms
from services.worker.core.elastic import ElasticScratch, OwnScratch, StepScratch
from services.worker.core.fetch_costs import FetchCosts
from services.worker.core.generation import Generation
from services.worker.core.host_buffer import HostBuffer
from services.worker.core.incoming import GrantTerms, Incoming
from services.worker.core.kv_cache import CacheParts, KvCache
from services.worker.core.layer_offload import OffloadRule
from services.worker.core.lender import Lender
from services.worker.core.lookups import Lookups
from services.worker.core.neighbours import Neighbours
from services.worker.core.offers import Offers
from services.worker.core.parking import Parking
from services.worker.core.parts import Parts
from services.worker.core.pool_memory import PoolMemory
from services.worker.core.prefetch import Prefetch
from services.worker.core.prefill import PrefillCore, PrefillTerms
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.resizing import PoolSize, Resizing
from services.worker.core.restoring import Restoring
from services.worker.core.returns import Returns
from services.worker.core.role import WorkerRole
from services.worker.core.scheduler import Scheduler
from services.worker.core.shared_prefix import SharedPrefixes
from services.worker.core.spare_memory import SpareMemory
from services.worker.core.spill import Spiller
from services.worker.settings import WorkerSettings

_COPY_BYTES = 16 * 2**20
"""Of one copy to a decode worker at the most, so that several transfers interleave."""


def kept(role: str, caching: int) -> Keep:
    """Which blocks a worker of that role keeps at a caching level (MemServe, section 5.2)."""
    if role == "decode":
        return Keep.ALL if caching >= 2 else Keep.NOTHING
    if role == "prefill" or caching < 2:
        return Keep.PROMPTS if caching >= 1 else Keep.NOTHING
    return Keep.ALL


def build_core(
    mine: Member,
    settings: WorkerSettings,
    size: PoolSize,
    layout: KvLayout,
    fit: StepFit | None = None,
    arena: ArenaTerms | None = None,
) -> WorkerRole:
    """A core of `mine.role` over a pool of that `size`. `fit`: what is known of the engine's cost; None: nothing.

    `arena`: what steps need of the pool's memory, unless --elastic is off. Raises ConfigError if nothing is left for KV.
    """
    keep = kept(mine.role, settings.caching)
    parts = _parts(mine, settings, size, layout, fit or StepFit(settings.step_tokens_limit), arena)
    fail_lost_loads = settings.on_load_failure == "fail"
    if mine.role == "prefill":
        terms = PrefillTerms(
            layout=layout,
            max_queued=settings.max_queued,
            transfer=settings.transfer,
            fail_lost_loads=fail_lost_loads,
        )
        return PrefillCore(
            mine, parts, Sender(layout.layers, max_copy_pages=max(1, _COPY_BYTES // layout.page_bytes)), terms
        )
    model = mine.model
    assert model is not None, "a worker serves a model"
    generation = Generation(parts.scheduler)
    grants = GrantTerms(
        layout=layout,
        keeps_blocks=keep is not Keep.NOTHING,
        root=lambda salt: root_hash(model, salt),
        epoch=mine.incarnation,
        lease_ms=settings.lease_ms,
        vocab_tokens=model.vocab_tokens,
        context_tokens=mine.takes_tokens,
    )
    receiver = Receiver(mine.incarnation, layout.layers)
    incoming = Incoming(receiver, parts.pool, parts.scheduler, generation, grants)
    decode = DecodeTerms(
        max_queued=settings.max_queued,
        layout=layout,
        returns_answers=settings.caching >= 3,
        fail_lost_loads=fail_lost_loads,
    )
    return DecodeCore(mine, parts, generation, incoming, decode)


def _pool_memory(pool: BlockPool, settings: WorkerSettings, size: PoolSize, arena: ArenaTerms | None) -> PoolMemory:
    scratch: StepScratch = OwnScratch()
    if settings.elastic != "off":
        assert arena is not None, "who lends memory to steps must know what they need"
        scratch = ElasticScratch(pool, arena, settings.elastic)
    if settings.spare_memory == "keep":
        return PoolMemory(scratch)
    rule = SpareRule(SpareMarks.of(size.n_pages // size.chunk_pages))
    return PoolMemory(scratch, SpareMemory(pool, rule, size.chunk_pages))


def _parts(
    mine: Member,
    settings: WorkerSettings,
    size: PoolSize,
    layout: KvLayout,
    fit: StepFit,
    arena: ArenaTerms | None,
) -> Parts:
    keep = kept(mine.role, settings.caching)
    block_bytes = layout.layers * layout.page_bytes
    use_store = settings.kvstore == "auto" and keep is not Keep.NOTHING
    dialled = {"decode"} if mine.role == "prefill" else set[str]()
    if keep is not Keep.NOTHING and mine.role != "decode":
        dialled.add(mine.role)
    neighbours = Neighbours(
        mine,
        dialled | ({"kvstore"} if use_store else set()),
        silent_ms=settings.silent_peer_ms,
        block_bytes=block_bytes,
    )
    pool = BlockPool(Ledger(size.n_pages), layout.layers, EVICTION_POLICIES[settings.eviction]())
    memory = _pool_memory(pool, settings, size, arena)
    reuse = PrefixReuse(pool, keep, layout.block_tokens, memory)
    policy = DecodeFirst(settings.step_tokens_limit, layout.block_tokens)
    calls = Calls()
    scheduler = Scheduler(reuse, layout, policy, max_running=settings.running_limit, context_tokens=mine.takes_tokens)
    parking = Parking(reuse, HostBuffer(size.host_pages, layout.layers, layout.page_bytes), calls)
    scheduler.park_in(parking, _offload_rule(mine, settings, layout, fit, parking))
    costs = FetchCosts(lambda: fit.cost, layout.block_tokens, always=settings.fetch == "always")
    cache_parts = CacheParts(
        pool=pool,
        events=EventLog("device"),
        prefetch=Prefetch(scheduler, Lookups(calls, costs, layout.layers), calls, costs, layout.layers),
        spiller=Spiller(pool, calls, settings.spill),
        lender=Lender(pool, block_bytes),
        returns=Returns(pool, calls, block_bytes, accepts=keep is not Keep.NOTHING),
        offers=Offers(calls, layout.block_tokens),
        costs=costs,
        restoring=Restoring(scheduler),
    )
    pool.listen(cache_parts.events)
    if use_store:
        pool.listen(cache_parts.spiller)
    callers = Callers(mine, silent_ms=settings.silent_peer_ms)
    cache = KvCache(cache_parts, neighbours, callers, use_store=use_store, fetches=keep is not Keep.NOTHING)
    keeps = keep is not Keep.NOTHING
    costing = Costing(fit, pool, layout.block_tokens, keeps=keeps)
    shared = SharedPrefixes(pool, scheduler, layout.block_tokens, keeps=keeps)
    resizing = Resizing(pool, size, worker=mine.id, block_tokens=layout.block_tokens)
    return Parts(pool, reuse, scheduler, callers, neighbours, cache, costing, shared, resizing, memory)


def _offload_rule(
    mine: Member, settings: WorkerSettings, layout: KvLayout, fit: StepFit, parking: Parking
) -> OffloadRule | None:
    """Which prompts are computed although not all of their layers fit: those that are answered here too."""
    asked = settings.layer_offload
    if asked == "off" or mine.role != "mixed":
        return None

    def retained(tokens: int) -> int:
        if isinstance(asked, int):
            return layout.layers - asked
        prefill_ms = (fit.cost or UNKNOWN_COST).exec_ms(tokens, 0)
        layer_bytes = layout.blocks_for(tokens) * layout.page_bytes
        return retained_layers(layout.layers, prefill_ms, layer_bytes, parking.bytes_per_s)

    # a processor takes a step of any length; an accelerator's engine is built for the longest one
    most_tokens = mine.takes_tokens if settings.device == "cpu" else settings.step_tokens_limit
    return OffloadRule(retained, most_tokens)
