"""Requests for the routing benchmarks, and what is read off their answers."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._llama13b import names
from benchmarks._virtual import Served, Visit
from common.messages.liveness import ModelIdentity

VOCAB_TOKENS = 32_000
_ANSWER_TOKEN = 7  # what virtual workers draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """MemServe's experiment with its scheduler: sessions that ask questions about shared documents, turn by turn."""

    document_tokens: int
    rate_per_s: float
    sessions: int = 80
    documents: int = 27
    requests: int = 250
    question_tokens: int = 64
    answer_tokens: int = 16


def document_trace(kind: Documents, model: ModelIdentity, seed: int) -> list[Visit]:
    """Session n asks about document n mod `documents`. Each turn's prompt is the whole conversation so far.

    Arrivals are Poisson; a turn whose turn before has no answer yet waits for it, and counts from then on.
    """
    rng = random.Random(seed)
    papers = [drawn(rng, kind.document_tokens) for _ in range(kind.documents)]
    said: list[tuple[int, ...]] = [papers[session % kind.documents] for session in range(kind.sessions)]
    last: dict[int, int] = {}
    trace: list[Visit] = []
    at_ms = 0.0
    for index in range(kind.requests):
        at_ms += rng.expovariate(kind.rate_per_s) * 1e3
        session = rng.randrange(kind.sessions)
        prompt = (*said[session], *drawn(rng, kind.question_tokens))
        said[session] = (*prompt, *(_ANSWER_TOKEN,) * kind.answer_tokens)
        trace.append(
            Visit(
                at_ms=at_ms,
                prompt=prompt,
                names=names(model, prompt),
                max_tokens=kind.answer_tokens,
                session=f"session-{session}",
                after=last.get(session),
            )
        )
        last[session] = index
    return trace


def cold_trace(n: int, rate_per_s: float, lengths: tuple[int, int], model: ModelIdentity, seed: int) -> list[Visit]:
    """Prompts that share nothing, of any length between two."""
    rng = random.Random(seed)
    at_ms = itertools.accumulate(rng.expovariate(rate_per_s) * 1e3 for _ in range(n))
    prompts = [drawn(rng, rng.randint(*lengths)) for _ in range(n)]
    return [
        Visit(at_ms=at, prompt=prompt, names=names(model, prompt), session=f"session-{index}")
        for index, (at, prompt) in enumerate(zip(at_ms, prompts, strict=True))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Popular:
    """One prefix that a share of all requests begins with; the others share nothing."""

    n: int
    rate_per_s: float
    share: float = 0.5
    prefix_tokens: int = 4_096
    tail_tokens: int = 256
    other_tokens: int = 2_048


def popular_trace(kind: Popular, model: ModelIdentity, seed: int) -> tuple[list[Visit], list[bool]]:
    """The requests, and which of them begin with the popular prefix."""
    rng = random.Random(seed)
    prefix = drawn(rng, kind.prefix_tokens)
    trace: list[Visit] = []
    popular: list[bool] = []
    at_ms = 0.0
    for index in range(kind.n):
        at_ms += rng.expovariate(kind.rate_per_s) * 1e3
        popular.append(rng.random() < kind.share)
        prompt = (*prefix, *drawn(rng, kind.tail_tokens)) if popular[-1] else drawn(rng, kind.other_tokens)
        trace.append(Visit(at_ms=at_ms, prompt=prompt, names=names(model, prompt), session=f"session-{index}"))
    return trace, popular


def sibling_trace(n: int, within_ms: float, prefix_tokens: int, model: ModelIdentity, seed: int) -> list[Visit]:
    """Prompts that arrive almost together and share a prefix nobody has seen."""
    rng = random.Random(seed)
    prefix = drawn(rng, prefix_tokens)
    prompts = [(*prefix, *drawn(rng, 64)) for _ in range(n)]
    at_ms = sorted(rng.uniform(1.0, 1.0 + within_ms) for _ in range(n))
    return [
        Visit(at_ms=at, prompt=prompt, names=names(model, prompt), session=f"session-{index}")
        for index, (at, prompt) in enumerate(zip(at_ms, prompts, strict=True))
    ]


def drawn(rng: random.Random, n_tokens: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCAB_TOKENS), k=n_tokens))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run."""

    mean_ms: float
    p50_ms: float
    p99_ms: float
    hit_share: float
    """Prompt tokens that were not computed."""


def outcome(served: Sequence[Served]) -> Outcome:
    ranked = sorted(one.ttft_ms for one in served)
    cached, tokens = sum(one.cached_tokens for one in served), sum(one.prompt_tokens for one in served)
    return Outcome(sum(ranked) / len(ranked), quantile(ranked, 0.5), quantile(ranked, 0.99), cached / tokens)


def quantile(ranked: Sequence[float], share: float) -> float:
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]
