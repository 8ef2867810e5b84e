"""Who is there, and how they are.

dialling side -> listening side   Hello    first message on a connection: who I am, what I run
listening side -> dialling side   Welcome  accepted; or Refused with a readable difference
dialling side -> listening side   Ping     every 500 ms; silence is news of a death
worker -> dialling side           Report   the answer to every Ping
gateway -> worker                 Drain    an operator's word: take nothing new; or take requests again
"""

from collections.abc import Sequence

import msgspec

from common.cost.link_cost import LinkCost
from common.cost.step_cost import StepCost
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages.base import Message


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What two workers must agree on, field by field, before one may use the other's KV."""

    name: str
    """Name that clients use."""
    fingerprint: str
    """Hex digest over the model's config and weight files."""
    architecture: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    vocab_tokens: int
    context_tokens: int
    """Prompt plus output may not exceed this."""


def difference(mine: ModelIdentity, theirs: ModelIdentity) -> str:
    """The fields in which two model identities differ, readable; empty if KV may flow between them."""
    rows = [
        f"{field}: {getattr(mine, field)!r} here, {getattr(theirs, field)!r} there"
        for field in mine.__struct_fields__
        if getattr(mine, field) != getattr(theirs, field)
    ]
    return "; ".join(rows)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A process's entry in the cluster's membership, kept in Redis under a lease."""

    id: WorkerId
    role: str
    """gateway, prefill, decode, mixed or kvstore."""
    incarnation: Incarnation
    endpoint: str
    """ZeroMQ address to dial; for a gateway its HTTP address."""
    host: str
    """Equal for processes of one running kernel, which may be able to share memory."""
    pid: int
    share_path: str | None = None
    """Unix socket that hands out descriptors of the page memory; None: no shared memory."""
    model: ModelIdentity | None = None
    model_path: str | None = None
    joined_unix_ms: int = 0
    share_kind: str = "memfd"
    """What `share_path` hands out: `memfd` (a file in host memory) or `cuda` (chunks of a device's memory)."""
    device_uuid: str = ""
    """Of the device that the pages lie on; empty on the host."""
    context_tokens: int | None = None
    """Prompt plus output that this worker takes (--max-context-tokens); None: what its model takes. Beside the model,
    because workers that differ in it may use each other's KV all the same."""
    versions: dict[str, str] = {}
    """Of the software that the process runs, by package: penstock, python, pyzmq, torch and the like."""
    policies: dict[str, str] = {}
    """Settings that change how it behaves, such as caching or routing rules, as they are set. For people to read."""
    pid_space: str = ""
    """Equal for processes of one PID namespace, where `pid` means the same; empty: not told."""

    def is_newer_than(self, other: "Member") -> bool:
        """Of two lives under one name the newer one counts; also of two whose clocks do not agree it is always the same."""
        return (self.joined_unix_ms, self.incarnation) > (other.joined_unix_ms, other.incarnation)

    @property
    def takes_tokens(self) -> int:
        """Prompt plus output may not exceed this here; 0 for who serves no model."""
        if self.model is None:
            return 0
        return self.model.context_tokens if self.context_tokens is None else self.context_tokens


def newer_life(mine: Member, members: Sequence[Member]) -> PeerId | None:
    """Who is listed under this process's name and is newer; None: nobody."""
    newer = [one for one in members if one.id == mine.id and one.is_newer_than(mine)]
    return peer_id(newer[0].id, newer[0].incarnation) if newer else None


class Hello(Message, frozen=True, kw_only=True):
    """Opens a connection."""

    member: Member


class Welcome(Message, frozen=True, kw_only=True):
    """The Hello was accepted."""

    member: Member


class Refused(Message, frozen=True, kw_only=True):
    """The Hello was not accepted; `text` lists each differing field with both values."""

    text: str


class Ping(Message, frozen=True, kw_only=True):
    """Keeps a connection alive and asks for a Report."""

    sequence: int


class Drain(Message, frozen=True, kw_only=True):
    """Begin or end draining. A draining worker finishes what it has, serves its KV, and refuses what is new."""

    on: bool


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of one pool by state; they add up to `total`."""

    total: int = 0
    free: int = 0
    reserved: int = 0
    """Allocated to a request whose prompt is not computed yet."""
    granted: int = 0
    """Being filled by a prefill worker."""
    active: int = 0
    cached: int = 0
    quarantined: int = 0
    """Not reusable until their writer is known to have stopped."""
    lent: int = 0
    """Their memory serves the steps as scratch, or was given back to the system for a while."""


class QueueCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one worker by phase, and the tokens they stand for."""

    waiting: int = 0
    running: int = 0
    handing_over: int = 0
    waiting_tokens: int = 0
    """Prompt tokens not computed yet."""
    work_ms: float = 0.0
    """Predicted time to compute all prompts that wait or are being computed, by the worker's own cost model."""
    kv_tokens: int = 0
    """Tokens of KV that running sequences hold: what a decoding step reads."""


SHARED_KINDS = frozenset({"shm", "cuda_ipc"})
"""Transports that map the peer's memory; over any other one its bytes come as payloads."""


class TransportReport(msgspec.Struct, frozen=True, kw_only=True):
    """How KV travels to one peer, as found by moving a test page at connection time."""

    peer: PeerId
    kind: str
    """cuda_ipc, shm or tcp."""
    gib_per_s: float
    reason: str = ""
    """Why not the faster one; empty if it is the fastest this build has."""


class MemoryPart(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one tier that serves one purpose. The parts of a tier add up to what the process has of it.

    A worker's `device` tier (host memory on a CPU) is its weights, its activations and its pool of pages:

        weights       the model
        activations   scratch of the forward pass, and pages of the pool that are lent to it
        kv_requests   KV that requests hold, with cached blocks that running requests or readers pin
        kv_prefix     cached blocks that can go at any time
        kv_free       pages that nobody holds, and memory on its way into or out of the pool
        released      pages whose memory is given back to the system until it is wanted again

    Its `host` tier is `parked` and `parked_free`. A KV store has `cached` and `free` on `host`, and `cached` on `disk`.
    """

    owner: str
    tier: str
    """device, host or disk."""
    n_bytes: int


class Report(Message, frozen=True, kw_only=True):
    """State of one worker when it answered."""

    worker: WorkerId
    role: str
    incarnation: Incarnation
    sequence: int
    """Of the Ping it answers."""
    pages: PageCounts
    queue: QueueCounts
    transports: tuple[TransportReport, ...] = ()
    engine_steps: int = 0
    """Steps finished; a worker with work whose number stands still is stuck."""
    counters: dict[str, float] = {}
    """Monotonic totals since start, Prometheus names without prefix, such as `generated_tokens_total`."""
    draining: bool = False
    gauges: dict[str, float] = {}
    """Values that rise and fall, such as `oldest_pin_ms`. Keys here and in `counters` may carry Prometheus labels:
    `hit_tokens_total{tier=host}`."""
    cost: StepCost | None = None
    """Fitted to this worker's own steps; None while there is nothing to fit."""
    links: tuple[LinkCost, ...] = ()
    """Sources of KV that this worker reads from, as far as it has measured them."""
    recallable_pages: int = 0
    """Of the lent pages, those that are lent for a while only: they can be had for KV, now or as soon as the system answers."""
    memory: tuple[MemoryPart, ...] = ()
    """Who has the process' memory, tier by tier, in the order of MemoryPart's table."""
    degraded: str = ""
    """Why other workers should be preferred for a while, such as that its watchdog fired; empty if they need not."""
