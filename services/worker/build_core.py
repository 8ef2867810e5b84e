"""Builds the pure half of a worker: the core of its role and the parts it is made of."""

from common.block_hash import root_hash
from common.messages.liveness import Member
from common.policy.admission import AdmissionGate, FirstComeFirstServed, SlackGate
from common.policy.buffer_scaling import BufferScaling
from common.policy.output_length import LengthPredictor
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from services.worker.build_parts import Machine, build_parts, kept
from services.worker.core.decode import DecodeCore, DecodeTerms
from services.worker.core.generation import Generation
from services.worker.core.host_buffer import HostBuffer
from services.worker.core.incoming import Incoming
from services.worker.core.page_queue import GrantTerms
from services.worker.core.prefill import PrefillCore, PrefillTerms
from services.worker.core.prefix import Keep
from services.worker.core.role import WorkerRole
from services.worker.core.slo import Slo, SloWatch
from services.worker.settings import WorkerSettings

_COPY_BYTES = 16 * 2**20
"""Of one copy to a decode worker at the most, so that several transfers interleave."""


def build_core(mine: Member, settings: WorkerSettings, machine: Machine) -> WorkerRole:
    """A core of `mine.role` over that machine. Raises ConfigError if scratch leaves nothing of the pool for KV."""
    layout, keep = machine.layout, kept(mine.role, settings.caching)
    parts = build_parts(mine, settings, machine)
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
    slo = Slo(ttft_ms=settings.slo_ttft_ms, tpot_ms=settings.slo_tpot_ms)
    generation = Generation(parts.scheduler, SloWatch(slo, LengthPredictor()))
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
        admission=_admission(settings),
        returns_answers=settings.caching >= 3,
        fail_lost_loads=fail_lost_loads,
        buffer_scaling=_scaling(settings, parts.scheduler.parking.buffer),
    )
    return DecodeCore(mine, parts, generation, incoming, decode)


def _admission(settings: WorkerSettings) -> AdmissionGate:
    return SlackGate(settings.slo_tpot_ms) if settings.admission == "slo" else FirstComeFirstServed()


def _scaling(settings: WorkerSettings, buffer: HostBuffer) -> BufferScaling | None:
    if settings.elastic != "full" or not buffer.capacity_pages:
        return None
    return BufferScaling(
        least_bytes=buffer.block_pages * buffer.page_bytes, physical_bytes=buffer.capacity_pages * buffer.page_bytes
    )
