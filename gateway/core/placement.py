"""Where a request goes: from an order, the workers as they are now and the prompt tree, to a Generate. Pure.

Owns the number of the gateway's turn. A replay is placed as the longer prompt that it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from common.block_hash import BlockHash
from common.errors import NoWorker
from common.ids import PeerId, WorkerId
from common.kv_layout import KvLayout
from common.messages.liveness import ModelIdentity
from common.messages.requests import FetchHint
from common.policy.estimates import Prompt, WorkerView
from common.policy.holdings import HoldingsIndex, NoHoldings
from common.policy.routing import NoRoute, Route, Router
from common.policy.routing_rules import PIN
from gateway.core.order import Order
from gateway.core.placed import Placed
from gateway.core.prompt_names import PromptNames
from gateway.core.roster import Roster
from gateway.core.totals import RoutingTotals


class Tree(HoldingsIndex, Protocol):
    """The prompt tree, as placing needs it."""

    def synced(self, now_ms: float) -> bool:
        """Whether it knows what workers cache; if not, requests are routed by load and what was routed before."""
        ...

    def expect(self, peer: PeerId, names: Sequence[BlockHash], now_ms: float) -> None:
        """A prompt was just sent there: the blocks of it that it lacked count as cached for a few seconds."""
        ...

    def forget(self, peer: PeerId) -> None:
        """That life is over: nothing of it counts from now on."""
        ...


class Placement:
    """Decides; never performs."""

    def __init__(self, roster: Roster, router: Router, tree: Tree, totals: RoutingTotals) -> None:
        self._roster, self._router, self._tree, self._totals = roster, router, tree, totals
        self._names = PromptNames()
        self._turn = 0

    def place(
        self, order: Order, emitted: Sequence[int], avoid: frozenset[WorkerId], now_ms: float, *, again: bool = False
    ) -> Placed:
        """Workers in `avoid` are taken only if nobody else is there. `again`: an attempt failed, so a worker that was asked
        for by name is not waited for. Raises NoWorker; InvalidRequest for a bad rule.
        """
        views = self._roster.views(now_ms)
        model = next((w.model for w in views if w.accepting and isinstance(w.model, ModelIdentity)), None)
        names = [] if model is None else self._names.of(order.prompt, emitted, model, order.cache_salt)
        holdings = self._tree.match(names) if names else NoHoldings()
        prompt = _prompt(order, len(order.prompt) + len(emitted), len(emitted), model)
        if again:
            rules = _unless_pinned(prompt.prefill_rule), _unless_pinned(prompt.decode_rule)
            prompt = replace(prompt, prefill_rule=rules[0], decode_rule=rules[1])
        route: Route | NoRoute = NoRoute("")
        if avoid:
            route = self._router.choose(prompt, [w for w in views if w.id not in avoid], holdings, self._turn)
        if isinstance(route, NoRoute):
            route = self._router.choose(prompt, views, holdings, self._turn)
        if isinstance(route, NoRoute):
            raise NoWorker(f"no worker can take the request: {route.reason}")
        self._turn += 1
        placed = self._placed(route, views, prompt, degraded=not self._tree.synced(now_ms))
        self._totals.on_placed(placed)
        for peer in dict.fromkeys((placed.entry, placed.decode)):
            self._tree.expect(peer, names[holdings.device_run(peer) :], now_ms)
        return placed

    def _placed(self, route: Route, views: Sequence[WorkerView], prompt: Prompt, *, degraded: bool) -> Placed:
        by_id = {w.id: w for w in views}
        entry, estimate = by_id[route.entry], route.estimate
        decode = entry if route.decode is None else by_id[route.decode]
        assert estimate is not None, "a route says what it was chosen by"
        fetch = estimate.fetch
        work_ms = entry.cost.exec_ms(prompt.tokens, estimate.hit_tokens) if route.local else estimate.own_ms
        decode_wait_ms = route.decode_choice.chosen.queued_ms if route.decode_choice is not None else 0.0
        return Placed(
            route=route,
            entry=entry.peer,
            decode=decode.peer,
            entry_name=f"{entry.role} worker {entry.id}",
            decode_name=f"{decode.role} worker {decode.id}",
            fetch=None if fetch is None else FetchHint(holder=fetch.holder, n_blocks=fetch.n_blocks),
            work_ms=work_ms,
            predicted_ms=estimate.queued_ms + work_ms + decode_wait_ms,
            hit_tokens=estimate.hit_tokens,
            degraded=degraded,
        )

    def forget(self, peer: PeerId) -> None:
        """That worker's life is over: what it cached is gone."""
        self._tree.forget(peer)

    def retry_after_s(self, now_ms: float) -> float | None:
        """Predicted time until the least loaded worker has computed what it has; None if nobody is ready."""
        waits_ms = [w.queued_ms for w in self._roster.views(now_ms) if w.accepting and w.role != "kvstore"]
        return min(waits_ms) / 1000 if waits_ms else None


def _unless_pinned(rule: str | None) -> str | None:
    return None if rule is not None and rule.startswith(PIN) else rule


def _prompt(order: Order, tokens: int, n_emitted: int, model: ModelIdentity | None) -> Prompt:
    return Prompt(
        request=order.request,
        tokens=tokens,
        max_tokens=order.sampling.max_tokens - n_emitted,
        block_tokens=16 if model is None else model.block_tokens,
        token_bytes=1 if model is None else token_bytes(model),
        session=order.session,
        prefill_rule=order.prefill_rule,
        decode_rule=order.decode_rule,
    )


def token_bytes(model: ModelIdentity) -> int:
    """KV of one token over all layers."""
    layout = KvLayout(
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        dtype=model.dtype,
        block_tokens=model.block_tokens,
    )
    return layout.layers * layout.page_bytes // layout.block_tokens
