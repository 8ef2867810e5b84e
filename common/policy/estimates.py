"""What a prompt would cost on each worker: time in the queue, time for what is fetched, time for what is computed. Pure."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from common.cost.link_cost import LinkCost
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.ids import PeerId, RequestId, WorkerId
from common.policy.holdings import Holdings

ASSUMED_TOKENS = 64
"""Answers are of unknown length. A longer guess makes the load of a decode worker count more, the transfer less."""
_SOURCES = 2  # peers looked at as sources of a longer prefix: those that hold most

Links = Mapping[tuple[str, str], LinkCost]
"""(PeerId, tier) -> what reading from there costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What a router may know about one worker."""

    id: WorkerId
    role: str
    """prefill, decode or mixed; others are never chosen."""
    model: Hashable
    """KV may flow between two workers whose `model` is equal; here the ModelIdentity."""
    accepting: bool
    """False while connecting, silent, draining, or serving another model than the caller's."""
    peer: PeerId
    """Its present life."""
    store: PeerId | None = None
    """The KV store that it reads from."""
    queued_ms: float = 0.0
    """Predicted time to compute the prompts that are there: its last report (stale by up to one Ping) less the time
    since, plus what the caller has sent since."""
    waiting: float = 0.0
    """Prompts of which nothing is computed yet, found in the same way."""
    requests: int = 0
    """Requests that live there, found in the same way."""
    kv_tokens: int = 0
    """Tokens of KV of its running requests."""
    free_tokens: int | None = None
    """Tokens for which it has pages that are free or only cached; None while unknown."""
    spare_tokens: int | None = None
    """Those of them whose pages hold nothing: what comes on top drives cached blocks out. None while unknown."""
    cost: StepCost = UNKNOWN_COST
    links: Links = field(default_factory=dict)
    """Of sources it can read from; and, from a prefill worker, of the decode workers it writes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a router may know about one prompt."""

    request: RequestId
    tokens: int
    """All that must be computed or found before the next token: with a replay, also what was drawn already."""
    max_tokens: int
    block_tokens: int = 16
    token_bytes: int = 1
    """KV of one token over all layers."""
    session: str | None = None
    """What the `session` rule keeps together."""
    prefill_rule: str | None = None
    decode_rule: str | None = None
    """Rules that the client asked for instead of the configured ones."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Take a longer prefix from another worker's device pool first."""

    holder: PeerId
    n_blocks: int
    """Leading blocks of the prompt there."""
    fetch_ms: float
    saved_ms: float
    """Computing that it saves; not below `fetch_ms` (MemServe, eq. 2)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One worker, one prompt. Times are predictions in milliseconds."""

    worker: WorkerId
    queued_ms: float
    """Before it would begin."""
    own_ms: float
    """From then on: to the first token (prefill), or for transfer and the next tokens (decode)."""
    load_ms: float
    """The same as if nothing were cached: what the gate compares."""
    requests: int
    hit_tokens: int = 0
    """Tokens of the prompt that would not be computed (prefill) or not be sent (decode)."""
    worth_tokens: float = 0.0
    """The same, each tier weighted by what fetching from it leaves of the gain: 1 for its own device."""
    fetch: Fetch | None = None
    waiting: float = 0.0
    """Prompts that wait there."""
    evict_ms: float = 0.0
    """Computing that the cached blocks stand for which it would drive out, taken to be as dear as its own."""

    @property
    def total_ms(self) -> float:
        """MemServe, eq. 1: the work before it and its own."""
        return self.queued_ms + self.own_ms


def best_sources(workers: Sequence[WorkerView], holdings: Holdings) -> list[tuple[PeerId, int]]:
    """Workers that hold the longest leading runs on their devices, longest first: draining ones serve their KV too."""
    runs = [(w.peer, holdings.device_run(w.peer)) for w in workers if w.role != "kvstore"]
    return sorted(((peer, run) for peer, run in runs if run), key=lambda pair: (-pair[1], pair[0]))[:_SOURCES]


def estimate_prefill(
    prompt: Prompt, worker: WorkerView, holdings: Holdings, sources: Sequence[tuple[PeerId, int]]
) -> Estimate:
    """Queue, fetches and computing (MemServe, eq. 1), each prefix fetched only where that is faster (eq. 2)."""
    cost, block, x = worker.cost, prompt.block_tokens, prompt.tokens
    usable = (x - 1) // block
    held = holdings.held(worker.peer, worker.store)
    device = run = min(held.device, usable)
    cold_ms = cost.exec_ms(x, 0)
    device_ms = own_ms = cost.exec_ms(x, run * block) if run else cold_ms
    worth = float(run * block)
    for tier, n_blocks in (("host", held.host), ("disk", held.disk)):
        n_blocks = min(n_blocks, usable - run)
        link = worker.links.get((worker.store or "", tier))
        if n_blocks <= 0 or link is None:
            continue
        fetch_ms = link.fetch_ms(n_blocks * block * prompt.token_bytes)
        computed_ms = cost.exec_ms(x, (run + n_blocks) * block)
        saved_ms = cost.exec_ms(x, run * block) - computed_ms
        if fetch_ms > saved_ms:
            break
        own_ms += fetch_ms - saved_ms
        worth += n_blocks * block * (1.0 - fetch_ms / saved_ms if saved_ms else 0.0)
        run += n_blocks
    fetch = None
    for peer, peer_run in sources:
        peer_run = min(peer_run, usable)
        link = worker.links.get((peer, "device"))
        if peer == worker.peer or peer_run <= run or link is None:
            continue
        fetch_ms = link.fetch_ms((peer_run - device) * block * prompt.token_bytes)
        computed_ms = cost.exec_ms(x, peer_run * block)
        if fetch_ms + computed_ms < own_ms:
            saved_ms = device_ms - computed_ms
            own_ms, run = fetch_ms + computed_ms, peer_run
            worth = device * block + (peer_run - device) * block * (1.0 - fetch_ms / saved_ms if saved_ms else 0.0)
            fetch = Fetch(peer, peer_run, fetch_ms, saved_ms)
    added = x - device * block
    evicted = 0 if worker.spare_tokens is None else max(0, added - worker.spare_tokens)
    return Estimate(
        worker.id,
        worker.queued_ms,
        own_ms,
        worker.queued_ms + cold_ms,
        worker.requests,
        run * block,
        worth,
        fetch,
        waiting=worker.waiting,
        evict_ms=device_ms * evicted / added,
    )


def estimate_decode(prompt: Prompt, worker: WorkerView, holdings: Holdings, entry: WorkerView | None) -> Estimate:
    """Sending what it lacks, and its next tokens beside those who are there. `entry` None: it computes what it lacks.

    A worker without free pages for the prompt must wait until running requests end: what it holds is taken to turn over
    once per `ASSUMED_TOKENS` steps.
    """
    cost, block, x = worker.cost, prompt.block_tokens, prompt.tokens
    usable = x if entry is not None else (x - 1) // block * block  # who computes it computes the last token anyway
    hit_tokens = min(holdings.held(worker.peer, None).device * block, usable)
    step_ms = cost.step_ms(worker.requests + 1, worker.kv_tokens + x)
    answer_ms = step_ms * min(prompt.max_tokens, ASSUMED_TOKENS)
    excess = 0 if worker.free_tokens is None else max(0, x - hit_tokens - worker.free_tokens)
    wait_ms = step_ms * ASSUMED_TOKENS * excess / max(1, worker.kv_tokens) if excess else 0.0
    if entry is None:
        wait_ms += worker.queued_ms
        own_ms = cost.exec_ms(x, hit_tokens) + answer_ms
    else:
        link = entry.links.get((worker.peer, "device"))
        own_ms = answer_ms + (0.0 if link is None else link.fetch_ms((x - hit_tokens) * prompt.token_bytes))
    load_ms = wait_ms + answer_ms
    return Estimate(worker.id, wait_ms, own_ms, load_ms, worker.requests, hit_tokens, float(hit_tokens))
