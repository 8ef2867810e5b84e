"""One worker as a gateway knows it, and how a routing policy sees it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from common.cost.link_cost import LinkCost
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.ids import PeerId
from common.messages.liveness import SHARED_KINDS, Member, Report
from common.policy.estimates import WorkerView
from gateway.core.breaker import Breaker
from gateway.core.charges import Charges

_UNLISTED_GRACE_MS = 3_000.0  # a worker that answers but left the membership: Redis may have lost it for a moment
_GIB = 2**30
_USUAL_TOKENS = 1_024
_ENOUGH_SAMPLES = 32
_FRESH_MS = 30_000.0
_DELAY_MS = 1.0  # of a read over a link that was only probed: a question and its answer
_DISK_SHARE = 0.25  # of the bandwidth to a KV store's memory, until reads of its disk were measured


@dataclass(slots=True)
class KnownWorker:
    """Mutable record of one life of a worker, owned by the Roster."""

    member: Member
    peer: PeerId
    misfit: str
    heard_ms: float
    """When it was dialled or last heard."""
    pinged_ms: float
    breaker: Breaker
    welcomed: bool = False
    refusal: str = ""
    unlisted_ms: float | None = None
    sequence: int = 0
    """Of the last Ping."""
    report: Report | None = None
    reported_ms: float = 0.0
    learnt_ms: float = 0.0
    """When its report last told of another cost."""
    drain_wish: bool | None = None
    """What an operator asked for, until a report shows it."""
    charges: Charges = field(default_factory=Charges)
    links: Mapping[tuple[str, str], LinkCost] = field(default_factory=dict)
    transports: Mapping[PeerId, str] = field(default_factory=dict)
    """Peers that KV can be moved to or from -> how."""

    def take_report(self, report: Report, now_ms: float) -> None:
        """The answer to a Ping."""
        if report.cost != self.reported_cost:
            self.learnt_ms = now_ms
        self.report, self.reported_ms = report, now_ms
        self.charges.on_report(min(report.sequence, self.sequence))  # nobody can answer a Ping that was not sent
        self.links = links_of(report)
        self.transports = {transport.peer: transport.kind for transport in report.transports}
        if self.drain_wish is not None and report.draining == self.drain_wish:
            self.drain_wish = None

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new, as far as is known. That it works again only a report can say: it may be ending."""
        return self.drain_wish is True or (self.report is not None and self.report.draining)

    def condition(self, now_ms: float) -> tuple[str, str]:
        """As in WorkerState: its condition, and why it is not ready; empty if it is."""
        if self.refusal:
            return "refused", self.refusal
        if self.misfit:
            return "misfit", self.misfit
        if not self.welcomed:
            return "connecting", f"{self.member.endpoint} has not answered yet"
        if self.draining:
            return "draining", "it finishes its work and takes no more"
        if self.unlisted_ms is not None and now_ms - self.unlisted_ms > _UNLISTED_GRACE_MS:
            return "leaving", "it is no longer in the membership"
        return "ready", ""

    @property
    def total_pages(self) -> int:
        """Of its KV, by its last report; 0 before it."""
        return 0 if self.report is None else self.report.pages.total

    @property
    def reported_cost(self) -> StepCost | None:
        """What it says that its steps cost; None before it has measured any."""
        return None if self.report is None else self.report.cost

    def is_trusted(self, now_ms: float) -> bool:
        """Whether it neither failed of late nor says itself that others should be preferred."""
        return self.breaker.lets_through(now_ms) and (self.report is None or not self.report.degraded)

    def trusted_cost(self, now_ms: float) -> StepCost | None:
        """The same, if it was fitted to enough steps, and to some of late: a bad fit gets no work to mend it by."""
        cost = self.reported_cost
        if cost is None or cost.n_samples < _ENOUGH_SAMPLES or now_ms - self.learnt_ms > _FRESH_MS:
            return None
        return cost

    def store_among(self, stores: list[PeerId]) -> PeerId | None:
        """The KV store it reads from: one whose memory it shares if there is one, else the first. As workers choose."""
        mine = [peer for peer in stores if peer in self.transports]
        return min(mine, key=lambda peer: (self.transports[peer] not in SHARED_KINDS, peer), default=None)

    def view(self, *, accepting: bool, store: PeerId | None, guess: StepCost, now_ms: float) -> WorkerView:
        """As the routing policy sees it. `guess`: what its steps cost, unless it knows itself."""
        report, charges, model = self.report, self.charges, self.member.model
        queued_ms, requests, kv_tokens = charges.work_ms, charges.requests, charges.tokens
        waiting, free_tokens, spare_tokens = float(charges.waiting), None, None
        if report is not None:
            queue = report.queue
            left_ms = max(0.0, queue.work_ms - (now_ms - self.reported_ms))
            queued_ms += left_ms
            waiting += queue.waiting * left_ms / queue.work_ms if queue.work_ms else 0.0
            requests += queue.waiting + queue.running + queue.handing_over
            kv_tokens += queue.kv_tokens
            if model is not None and report.pages.total:
                spare, cached = report.pages.free + report.recallable_pages, report.pages.cached
                free_tokens = max(0, (spare + cached) // model.layers * model.block_tokens - charges.tokens)
                spare_tokens = max(0, spare // model.layers * model.block_tokens - charges.tokens)
        return WorkerView(
            id=self.member.id,
            role=self.member.role,
            model=model,
            accepting=accepting,
            peer=self.peer,
            store=store,
            queued_ms=queued_ms,
            waiting=waiting,
            requests=requests,
            kv_tokens=kv_tokens,
            free_tokens=free_tokens,
            spare_tokens=spare_tokens,
            cost=self.trusted_cost(now_ms) or guess,
            links=self.links,
        )


def usual_cost(role: str, workers: Iterable[KnownWorker], now_ms: float) -> StepCost:
    """What a worker of a role is taken to cost while it has not measured enough itself: the median of those that have.

    So it gets its share, and learns. Where nobody has measured enough it is the median of what there is: the same for all.
    """
    mine = [worker for worker in workers if worker.member.role == role]
    trusted = [cost for worker in mine if (cost := worker.trusted_cost(now_ms)) is not None]
    known = trusted or [cost for worker in mine if (cost := worker.reported_cost) is not None]
    costs = sorted(known, key=lambda cost: cost.exec_ms(_USUAL_TOKENS, 0))
    return costs[len(costs) // 2] if costs else UNKNOWN_COST


def links_of(report: Report) -> dict[tuple[str, str], LinkCost]:
    """What reading from each source costs: as probed, until the worker has measured it."""
    links: dict[tuple[str, str], LinkCost] = {}
    for transport in report.transports:
        bytes_per_s = max(1.0, transport.gib_per_s * _GIB)
        for tier, share in (("device", 1.0), ("host", 1.0), ("disk", _DISK_SHARE)):
            links[transport.peer, tier] = LinkCost(transport.peer, tier, bytes_per_s * share, _DELAY_MS)
    links.update({(link.peer, link.tier): link for link in report.links if link.bytes_per_s > 0})
    return links
