"""What prompts whose layers share pages have in common, wherever their layers go. Pure.

A layer that leaves lies in one of `RING_LAYERS` columns of pages that such layers take in turns; the engine waits before it
writes into a column whose last layer has not been copied. So such a prompt is computed in one step, which is its own.
"""

from collections.abc import Callable
from collections.abc import Sequence as Run
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.policy.batching import Candidate, DecodeFirst
from common.policy.layer_retention import offloaded
from kvstore.index.ledger import PageIds
from services.worker.core.actions import Action, Moved
from services.worker.core.sequence import Sequence

RING_LAYERS = 2


@dataclass(frozen=True, slots=True)
class OffloadRule:
    """Which prompts may be computed so."""

    retained: Callable[[int], int]
    """Tokens to compute -> layers whose KV stays on the device."""
    most_tokens: int
    """Of one step."""
    streams: bool = False
    """Layers go to the prompt's decode worker, not to the host buffer."""
    scratch_pages: Callable[[int], int] = lambda _: 0
    """Tokens -> pages of the pool that must serve a step of so many."""

    def leaving(self, layers: int, tokens: int) -> tuple[int, ...]:
        """Of so many layers, those that leave when so many tokens are computed."""
        return offloaded(layers, layers - min(layers, max(0, self.retained(tokens))))


class InOneStep(DecodeFirst):
    """A policy of batching: all tokens of the candidates, or none."""

    @staticmethod
    def of(candidates: Run[Candidate]) -> "InOneStep":
        """For just these candidates."""
        return InOneStep(sum(one.known_tokens - one.computed_tokens for one in candidates), 1)

    def choose(self, candidates: Run[Candidate], limit_tokens: int | None = None) -> list[int]:
        """None if they exceed the limit."""
        fit = limit_tokens is None or self.max_step_tokens <= limit_tokens
        return [one.known_tokens - one.computed_tokens if fit else 0 for one in candidates]


class LayerWise(Protocol):
    """Who computes prompts so, as the Scheduler sees it."""

    def has_room(self, tokens: int, pinned_blocks: int, unpinned_blocks: int, *, loads: bool) -> bool:
        """As `Scheduler.has_room`, for a prompt whose layers would leave."""
        ...

    def may_begin(self, sequence: Sequence) -> bool:
        """Whether a sequence that waits may begin so; all that wait before it let it pass."""
        ...

    def begin(self, sequence: Sequence) -> None:
        """Give it pages for the layers that stay, and the ring for the others."""
        ...

    def call_off(self, sequence: Sequence) -> None:
        """There is no scratch for its step now."""
        ...

    def step_begins(self, sequence: Sequence) -> None:
        """The step of its prompt is about to begin."""
        ...

    def on_layer(self, layer: int, n_layers: int) -> list[Action]:
        """The engine wrote K and V of `n_layers` layers, from `layer` on."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """The step of its prompt has ended."""
        ...

    def on_moved(self, call: int, moved: Moved) -> bool:
        """A copy to the host has ended; False if it is none of these."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever phase."""
        ...

    @property
    def calls(self) -> set[int]:
        """Under which the host buffer is used."""
        ...

    def counters(self) -> dict[str, float]:
        """As in reports."""
        ...


def alone_of(sequences: Run[Sequence]) -> Sequence | None:
    """The first of these whose layers share pages: it has a step for itself, in one piece."""
    return next((one for one in sequences if one.ring is not None), None)


def laid_out(leaving: tuple[int, ...], staying: tuple[int, ...], ring_pages: PageIds, kept_pages: PageIds) -> PageIds:
    """Pages [blocks, layers] out of those of the ring [blocks, RING_LAYERS] and of layers that stay [blocks, staying]."""
    pages = np.empty((len(ring_pages), len(leaving) + len(staying)), np.int32)
    pages[:, list(staying)] = kept_pages
    for place, layer in enumerate(leaving):
        pages[:, layer] = ring_pages[:, place % RING_LAYERS]
    return pages


def writable_layer(leaving: tuple[int, ...], n_copied: int, layers: int) -> int:
    """Up to which layer the engine may write when the first `n_copied` that leave have been copied."""
    following = n_copied + RING_LAYERS
    return leaving[following] - 1 if following < len(leaving) else layers - 1
