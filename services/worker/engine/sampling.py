"""Choosing the next token of each sequence from its logits.

Order, per row: penalties, temperature, min-p, top-k, top-p, then the inverse of the cumulative distribution over
tokens sorted by falling probability, ties by rising id, at a uniform number that depends on (seed, t) alone. Each cut
keeps a prefix of that order. Nothing here depends on the other rows of the batch.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.messages.requests import Sampling, TokenLogprob
from services.worker.core.plan import Sampled, Segment
from services.worker.engine.chance import uniform

_Floats: TypeAlias = NDArray[np.float64]
_LIKELIEST = (1024, 16_384)
"""Tokens sorted at first and at second; the whole vocabulary is sorted only for a draw that falls behind them."""


def sample(segments: Sequence[Segment], logits: Tensor) -> tuple[Sampled, ...]:
    """The next token of each segment. `logits` [segments, vocab] float32 is left as it is."""
    plain = [_is_plain_greedy(segment.sampling) for segment in segments]
    likeliest: list[int] = logits.argmax(dim=-1).tolist() if any(plain) else []
    sampled: list[Sampled] = []
    for row, segment in enumerate(segments):
        token = likeliest[row] if plain[row] else _choose(segment, logits[row])
        sampled.append(Sampled(segment.request, token, _logprob(segment.sampling, logits[row], token)))
    return tuple(sampled)


def _is_plain_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0.0 and not _has_penalties(sampling)


def _has_penalties(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _choose(segment: Segment, logits: Tensor) -> int:
    sampling = segment.sampling
    row: _Floats = logits.cpu().numpy().astype(np.float64)
    if _has_penalties(sampling):
        row = penalised(row, segment.tokens, segment.prompt_tokens, sampling)
    if sampling.temperature == 0.0:
        return int(row.argmax())
    return draw(row / sampling.temperature, sampling, uniform(sampling.seed, segment.output_position))


def penalised(logits: _Floats, tokens: Sequence[int], prompt_tokens: int, sampling: Sampling) -> _Floats:
    """A copy of `logits` [vocab] with penalties for what stands in `tokens` already.

    Repetition (prompt and output, once each): divides positive logits, multiplies negative ones.
    Frequency and presence (output only): subtract per occurrence, and once.
    """
    changed = logits.copy()
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(tokens, dtype=np.int64))
        scores = changed[seen]
        penalty = sampling.repetition_penalty
        changed[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    if len(tokens) > prompt_tokens and (sampling.frequency_penalty or sampling.presence_penalty):
        generated, counts = np.unique(np.asarray(tokens[prompt_tokens:], dtype=np.int64), return_counts=True)
        changed[generated] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return changed


def draw(logits: _Floats, sampling: Sampling, chance: float) -> int:
    """The token at `chance` in [0, 1) of the truncated distribution of `logits` [vocab], temperature applied."""
    weights = np.exp(logits - logits.max())
    total = float(weights.sum())
    for n_tokens in (*_LIKELIEST, len(weights)):
        token = _draw_sorted(weights, _likeliest_first(weights, n_tokens), total, sampling, chance)
        if token is not None:
            return token
    raise AssertionError("the whole vocabulary holds every draw")


def _likeliest_first(weights: _Floats, n_tokens: int) -> NDArray[np.int64]:
    """At least the `n_tokens` likeliest ids, by falling weight, ties by rising id."""
    if n_tokens < len(weights):
        limit = np.partition(weights, len(weights) - n_tokens)[len(weights) - n_tokens]
        ids = np.flatnonzero(weights >= limit)
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")]


def _draw_sorted(
    weights: _Floats, ids: NDArray[np.int64], total: float, sampling: Sampling, chance: float
) -> int | None:
    """The drawn token if it is among the likeliest `ids`; None if more of them are needed to tell."""
    ordered = weights[ids]
    mass = np.cumsum(ordered)
    complete = len(ids) == len(weights)
    # A cut by min-p or top-k ends the support; without one that falls into `ids`, the support is everything.
    kept = int(np.searchsorted(-ordered, -sampling.min_p * ordered[0], side="right"))
    kept = min(kept, sampling.top_k or len(weights))
    ends_here = complete or kept < len(ids)
    if not ends_here and (sampling.min_p > 0.0 or sampling.top_k):
        return None
    kept_mass = float(mass[kept - 1]) if ends_here else total
    if sampling.top_p < 1.0:
        reached = int(np.searchsorted(mass, sampling.top_p * kept_mass, side="left"))
        if reached >= len(ids) and not complete:
            return None
        kept = min(kept, reached + 1)
        kept_mass = float(mass[kept - 1])
    place = int(np.searchsorted(mass, chance * kept_mass, side="right"))
    if place >= len(ids) and not complete:
        return None
    return int(ids[min(place, kept - 1)])


def _logprob(sampling: Sampling, logits: Tensor, token: int) -> TokenLogprob | None:
    """Natural-log probabilities before any change to the logits."""
    if sampling.logprobs is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs > 0:
        values, ids = logprobs.topk(min(sampling.logprobs, logits.shape[0]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
    return TokenLogprob(token, float(logprobs[token]), top)
