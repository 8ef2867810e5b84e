"""Which workers take a request: a (prefill, decode) pair, or one worker alone. Pure: no clock, no I/O, no randomness.

A prefill worker counts only together with a decode worker that runs the very same model, because KV flows between them.
A mixed worker is a choice of its own beside the prefill workers. A decode worker computes the prompt itself if it lacks
little of it, or if no prefill worker is ready (conditional disaggregation).
Source: MemServe (arXiv 2406.17565, section 5.5); the rules are in common.policy.routing_rules, what a worker would cost
a prompt in common.policy.estimates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import InvalidRequest
from common.ids import WorkerId
from common.policy.estimates import Estimate, Prompt, WorkerView, best_sources, estimate_decode, estimate_prefill
from common.policy.holdings import Holdings
from common.policy.routing_rules import Choice, Pinned, Rule, Side, rule_named, through_gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes, and the numbers that led there. `decode` is None if `entry` answers alone."""

    entry: WorkerId
    decode: WorkerId | None = None
    local: str | None = None
    """Why a decode worker computes the prompt itself: `few-uncached` or `no-prefill-worker`; None if it does not."""
    entry_choice: Choice | None = None
    decode_choice: Choice | None = None

    @property
    def estimate(self) -> Estimate | None:
        """What the entry worker was predicted to cost."""
        return None if self.entry_choice is None else self.entry_choice.chosen


@dataclass(frozen=True, slots=True)
class NoRoute:
    """Nobody can take it; `reason` says what is missing, for people."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The question, answered by one rule for prefill and one for decode."""

    prefill: str = "predicted-time"
    """Name of the rule that picks who computes prompts."""
    decode: str = "predicted-time"
    """Name of the rule that picks who draws answers."""
    gate: float = 1.0
    """How much more loaded than the least loaded a worker may be to be chosen for what it holds: 1 is twice as much."""
    local_prefill_tokens: int = 16
    """A decode worker that lacks no more of a prompt computes it itself; 0: never for that reason."""
    fallback: bool = True
    """Whether decode workers compute prompts when no prefill or mixed worker is ready."""
    peer_fetch: bool = True
    """Whether a worker may be told to fetch a prefix from another one (MemServe, eq. 2)."""

    def choose(self, prompt: Prompt, workers: Sequence[WorkerView], holdings: Holdings, turn: int) -> Route | NoRoute:
        """`turn` counts the caller's requests; it is all the memory that a rule has. Raises InvalidRequest for an override."""
        entries, decodes = entries_of(workers), [w for w in workers if w.role == "decode" and w.accepting]
        side = Side(prompt, self.gate, turn)
        entry_rule = rule_named(prompt.prefill_rule or self.prefill)
        decode_rule = rule_named(prompt.decode_rule or self.decode)
        if not entries and not (self.fallback and decodes):
            return NoRoute(missing(workers))
        alone = [estimate_decode(prompt, w, holdings, None) for w in decodes]
        if entries:
            alone = self._lacking_little(prompt, decodes, alone, holdings)
        if alone:
            found = decode_rule.choose(side, alone)
            if found is None:
                return _no_route("decode", decode_rule, decodes, workers)
            local = "few-uncached" if entries else "no-prefill-worker"
            return Route(entry=found.chosen.worker, local=local, entry_choice=found)
        sources = best_sources(workers, holdings) if self.peer_fetch else []
        estimates = [estimate_prefill(prompt, w, holdings, sources) for w in entries]
        entry_choice = entry_rule.choose(side, estimates)
        if entry_choice is None:
            return _no_route("prefill", entry_rule, entries, workers)
        entry = next(w for w in entries if w.id == entry_choice.chosen.worker)
        if entry.role == "mixed":
            return Route(entry=entry.id, entry_choice=entry_choice)
        fitting = [w for w in decodes if w.model == entry.model]
        decode_choice = decode_rule.choose(side, [estimate_decode(prompt, w, holdings, entry) for w in fitting])
        if decode_choice is None:
            return _no_route("decode", decode_rule, fitting, workers)
        return Route(
            entry=entry.id, decode=decode_choice.chosen.worker, entry_choice=entry_choice, decode_choice=decode_choice
        )

    def _lacking_little(
        self, prompt: Prompt, decodes: list[WorkerView], estimates: list[Estimate], holdings: Holdings
    ) -> list[Estimate]:
        """Of decode workers that hold nearly all of the prompt, and are not much more loaded than the others.

        What is only expected there does not count: the first of many siblings would draw all others after it before its KV
        exists. A rule that was asked for by name is not passed over.
        """
        limit = self.local_prefill_tokens
        if not limit or prompt.prefill_rule is not None:
            return []
        open_ones = {one.worker for one in through_gate(estimates, self.gate)}
        return [
            one
            for worker, one in zip(decodes, estimates, strict=True)
            if one.worker in open_ones
            and prompt.tokens - holdings.device_run(worker.peer) * prompt.block_tokens <= limit
        ]


def entries_of(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Prefill and mixed workers that a request may be sent to first, by id."""
    models = {w.model for w in workers if w.role == "decode" and w.accepting}
    return sorted(
        (w for w in workers if w.accepting and (w.role == "mixed" or (w.role == "prefill" and w.model in models))),
        key=lambda w: w.id,
    )


def reason_not_ready(workers: Sequence[WorkerView], *, fallback: bool) -> str | None:
    """Why `workers` can serve nobody now; None if they can. `fallback`: as in Router."""
    if entries_of(workers) or (fallback and any(w.role == "decode" and w.accepting for w in workers)):
        return None
    return missing(workers)


def missing(workers: Sequence[WorkerView]) -> str:
    """What would be needed to serve a request."""
    counts = {role: sum(w.role == role for w in workers) for role in ("prefill", "decode", "mixed")}
    ready = {role: sum(w.role == role and w.accepting for w in workers) for role in counts}
    text = ", ".join(f"{role}: {ready[role]} of {counts[role]} ready" for role in counts)
    if ready["prefill"] and ready["decode"]:
        return f"no ready prefill worker runs the same model as a ready decode worker ({text})"
    return f"a prefill and a decode worker, or a mixed worker, must be ready ({text})"


_ROLES = {"prefill": ("prefill", "mixed"), "decode": ("decode",)}


def _no_route(side: str, rule: Rule, candidates: Sequence[WorkerView], workers: Sequence[WorkerView]) -> NoRoute:
    """Only a rule that names a worker finds none among several. Raises InvalidRequest if it never could."""
    fit = sorted(w.id for w in workers if w.role in _ROLES[side])
    if isinstance(rule, Pinned) and rule.worker not in fit:
        text = f"{rule.name}: no such worker is here for {side}; there are {', '.join(fit) or 'none'}"
        raise InvalidRequest(text, param=f"x-penstock-route-{side}")
    return NoRoute(f"rule {rule.name!r} finds none fit of {', '.join(w.id for w in candidates) or 'nobody'}")
