"""`mix`: several kinds of conversation in fixed shares, such as nine short prompts for each long document. Pure."""

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from loadgen.workload.plan import Conversation, Workload

ROUND = 1000
"""Conversations after which every share is exact; a weight below 1 / ROUND would never be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of conversation."""

    weight: float
    """Share among the weights of all parts."""
    label: str
    """Becomes the group of its conversations, for reports that tell kinds apart."""
    workload: Workload
    """Endless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Within every round of 1000 each part has its exact share, in an order drawn anew.

    A part sees places without holes, so that what it promises about neighbours and ratios holds among its own.
    """

    seed: int | str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for a part that would never be sent, or that ends."""
        for part, count in zip(self.parts, _counts(self._weights()), strict=True):
            if count == 0:
                raise ValueError(f"{part.label}: a weight below 1 in {ROUND} is never sent")
            if part.workload.n_conversations is not None:
                raise ValueError(f"{part.label}: a mix is made of endless workloads")

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def conversation(self, index: int) -> Conversation:
        """The conversation at that place."""
        turn, place = divmod(index, ROUND)
        chosen, before = _places(f"{self.seed}/round/{turn}", self._weights())[place]
        part = self.parts[chosen]
        within = turn * _counts(self._weights())[chosen] + before
        return replace(part.workload.conversation(within), index=index, group=part.label)

    def _weights(self) -> tuple[float, ...]:
        return tuple(part.weight for part in self.parts)


@lru_cache(maxsize=64)
def _counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Conversations of each part in a round: largest remainders."""
    exact = [ROUND * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in by_remainder[: ROUND - sum(counts)]:
        counts[part] += 1
    return tuple(counts)


@lru_cache(maxsize=16)
def _places(name: str, weights: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """(part, how many of that part came before in this round) of every place."""
    order = [part for part, count in enumerate(_counts(weights)) for _ in range(count)]
    Random(name).shuffle(order)
    seen = [0] * len(weights)
    places = []
    for part in order:
        places.append((part, seen[part]))
        seen[part] += 1
    return tuple(places)
