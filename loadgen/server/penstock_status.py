"""Penstock's own `/status`. Pure. Fields that a gateway of another version lacks read as 0."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any  # Any: JSON

import msgspec

from loadgen.results.nesting import is_deeper
from loadgen.results.timeline import ServerSample, WorkerSample

_COMPUTE_ROLES = ("prefill", "decode", "mixed")
_HELD_PAGES = ("reserved", "granted", "active", "quarantined")
_DEEPEST = 32
"""Levels of a document worth keeping. A deeper one could not be written into the result."""
_SANE = msgspec.Meta(ge=-(2**53), le=2**53)
_Count = Annotated[int, _SANE]
_Number = Annotated[float, _SANE]


class _Pages(msgspec.Struct):
    total: _Count = 0
    reserved: _Count = 0
    granted: _Count = 0
    active: _Count = 0
    cached: _Count = 0
    quarantined: _Count = 0


class _Queue(msgspec.Struct):
    waiting: _Count = 0
    running: _Count = 0
    handing_over: _Count = 0


class _Model(msgspec.Struct):
    layers: _Count = 0


class _MemoryPart(msgspec.Struct, rename={"n_bytes": "bytes"}):
    owner: str
    tier: str
    n_bytes: _Count


class _Worker(msgspec.Struct):
    id: str
    role: str = ""
    model: _Model | None = None
    pages: _Pages = msgspec.field(default_factory=_Pages)
    queue: _Queue = msgspec.field(default_factory=_Queue)
    gauges: dict[str, _Number] = {}
    charged_requests: _Count = 0
    memory: list[_MemoryPart] = []

    @property
    def computes(self) -> bool:
        return self.role in _COMPUTE_ROLES

    @property
    def used_pages(self) -> float:
        pages = self.pages
        return pages.reserved + pages.granted + pages.active + pages.quarantined + self.pinned_pages

    @property
    def pinned_pages(self) -> float:
        """Whole blocks of running requests are in the cache already, pinned: cached pages, but not free to go."""
        layers = 0 if self.model is None else self.model.layers  # a block has one page per layer
        return min(self.pages.cached, self.gauges.get("pinned_blocks", 0.0) * layers)

    @property
    def running(self) -> int:
        # A prompt on its way is counted where it comes from; its decode worker counts the same transfer once more.
        return self.queue.running + (self.queue.handing_over if self.role == "prefill" else 0)


class _Gateway(msgspec.Struct):
    open_requests: _Count = 0
    waiting_requests: _Count = 0


class _Status(msgspec.Struct):
    gateway: _Gateway
    workers: list[_Worker]


_decode = msgspec.json.Decoder(_Status).decode


class PenstockStatus:
    """A Source. One gateway speaks: it knows every worker, and of requests that wait at a gateway only its own."""

    server = "Penstock"
    path = "/status"

    def sample(self, body: bytes, at_s: float) -> ServerSample:
        """The system at that moment, as of the workers' last reports. KV stores compute nothing: only their memory counts."""
        status = _read(body)
        workers = [worker for worker in status.workers if worker.computes]
        pages = sum(worker.pages.total for worker in workers)
        return ServerSample(
            at_s=at_s,
            waiting=status.gateway.waiting_requests + sum(worker.queue.waiting for worker in workers),
            running=sum(worker.running for worker in workers),
            kv_used=sum(worker.used_pages for worker in workers) / pages if pages else None,
            workers={worker.id: _worker_sample(worker) for worker in workers},
            memory={worker.id: _by_tier(worker.memory) for worker in status.workers if worker.memory},
        )

    def held(self, body: bytes) -> dict[str, float]:
        """Pages, places in queues, leases and pins of every worker, and the gateway's requests."""
        status = _read(body)
        found: dict[str, float] = {
            "gateway: open requests": status.gateway.open_requests,
            "gateway: waiting requests": status.gateway.waiting_requests,
        }
        for worker in status.workers:
            found |= {f"{worker.id}: {name}": value for name, value in _held_by(worker)}
        return found

    def document(self, body: bytes) -> Mapping[str, object]:
        """All of it."""
        _read(body)
        found: dict[str, Any] = msgspec.json.decode(body)
        if is_deeper(found, _DEEPEST):
            raise ValueError(f"/status: nested deeper than {_DEEPEST} levels")
        return found


def _read(body: bytes) -> _Status:
    try:
        return _decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"/status: not Penstock's: {error}") from error


def _worker_sample(worker: _Worker) -> WorkerSample:
    total = max(1, worker.pages.total)
    return WorkerSample(
        role=worker.role,
        waiting=worker.queue.waiting,
        running=worker.running,
        kv_used=worker.used_pages / total,
        kv_cached=(worker.pages.cached - worker.pinned_pages) / total,
    )


def _by_tier(parts: Sequence[_MemoryPart]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for part in parts:
        found.setdefault(part.tier, {})[part.owner] = part.n_bytes
    return found


def _held_by(worker: _Worker) -> Iterator[tuple[str, float]]:
    if worker.computes:  # to a KV store every page that it keeps something in is active
        yield from ((f"{state} pages", getattr(worker.pages, state)) for state in _HELD_PAGES)
        yield "charged requests", worker.charged_requests
    yield from (
        (f"{name.replace('_', ' ')} requests", getattr(worker.queue, name)) for name in worker.queue.__struct_fields__
    )
    yield "leases", worker.gauges.get("leases", 0.0)
    yield "pinned blocks", worker.gauges.get("pinned_blocks", 0.0)
