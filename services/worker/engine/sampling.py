"""Choosing the next token of each sequence from its logits.

Order, per row: penalties, temperature, min-p, top-k, top-p, then a draw at a uniform number that depends on (seed, t)
alone. Nothing here depends on the other rows of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.messages.requests import Sampling, TokenLogprob
from services.worker.core.plan import Sampled, Segment, has_penalties
from services.worker.engine.chance import uniform
from services.worker.engine.drawing import draw_rows
from services.worker.engine.penalties import penalise_into

_GREEDY_BELOW = 1e-5
"""Temperatures under this are 0: a token would have to be within 0.0001 of the likeliest to be drawn at all."""


def sample(segments: Sequence[Segment], logits: Tensor) -> tuple[Sampled, ...]:
    """The next token of each segment. `logits` [segments, vocab] float32 is left as it is.

    Any logits will do: nan counts as -inf, +inf as the largest number there is; a row of nothing but -inf gives 0.
    """
    usable = _usable(logits)
    tokens = _choose(segments, usable)
    return tuple(
        Sampled(segment.request, tokens[row], _logprob(segment.sampling, usable[row], tokens[row]))
        for row, segment in enumerate(segments)
    )


def _usable(logits: Tensor) -> Tensor:
    largest = torch.finfo(logits.dtype).max
    return torch.nan_to_num(logits, nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def _choose(segments: Sequence[Segment], logits: Tensor) -> list[int]:
    penalised = [row for row, segment in enumerate(segments) if has_penalties(segment.sampling)]
    if penalised:
        logits = logits.cpu().clone()  # the logprobs are those of the untouched ones
        for row in penalised:
            segment = segments[row]
            penalise_into(logits[row], segment.tokens, segment.prompt_tokens, segment.sampling)
        logits = _usable(logits)
    drawn = [row for row, segment in enumerate(segments) if not _is_greedy(segment.sampling)]
    if not drawn:
        return _likeliest(logits)
    everything = len(drawn) == len(segments)
    tokens = [0] * len(segments) if everything else _likeliest(logits)
    asked = [segments[row].sampling for row in drawn]
    chances = [uniform(segments[row].sampling.seed, segments[row].output_position) for row in drawn]
    picked = logits if everything else logits.index_select(0, torch.tensor(drawn, device=logits.device))
    for row, token in zip(drawn, draw_rows(picked.cpu(), asked, chances), strict=True):
        tokens[row] = token
    return tokens


def _likeliest(logits: Tensor) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


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
