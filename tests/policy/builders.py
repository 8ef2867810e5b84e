"""Prompts, workers and holdings for tests of routing; each changes one argument at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.cost.link_cost import LinkCost
from common.cost.step_cost import StepCost
from common.ids import PeerId, RequestId, WorkerId
from common.policy.estimates import Prompt, WorkerView
from common.policy.holdings import NOTHING_HELD, Held

TOKEN_MS = 1.0
COST = StepCost(0.0, TOKEN_MS, 0.0, 1.0, 0.0, chunk_tokens=512)
"""A token a millisecond, a row of a decoding step a millisecond: predictions can be told in one's head."""
BLOCK = 16


def peer(name: str) -> PeerId:
    return PeerId(f"{name}@1")


def worker(name: str, **changes: object) -> WorkerView:
    fields: dict[str, object] = {
        "id": WorkerId(name),
        "role": name.split("-")[0],
        "model": "m",
        "accepting": True,
        "peer": peer(name),
        "cost": COST,
        **changes,
    }
    return WorkerView(**fields)  # type: ignore[arg-type]  # a builder


def prompt(tokens: int = 1000, **changes: object) -> Prompt:
    fields: dict[str, object] = {"request": RequestId("r"), "tokens": tokens, "max_tokens": 1, "token_bytes": 100}
    return Prompt(**{**fields, **changes})  # type: ignore[arg-type]  # a builder


@dataclass
class Cached:
    """Holdings as a test tells them."""

    by_worker: Mapping[str, Held] = field(default_factory=dict)

    def held(self, worker: PeerId, store: PeerId | None) -> Held:
        found = self.by_worker.get(worker.partition("@")[0], NOTHING_HELD)
        return found if store is not None else Held(found.device)

    def device_run(self, peer: PeerId) -> int:
        return self.held(peer, None).device


def link(to: str, *, bytes_per_ms: float = 1e6, delay_ms: float = 0.0, tier: str = "device") -> LinkCost:
    return LinkCost(peer(to), tier, bytes_per_ms * 1000, delay_ms)


def links(*found: LinkCost) -> dict[tuple[str, str], LinkCost]:
    return {(one.peer, one.tier): one for one in found}
