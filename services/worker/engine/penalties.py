"""Penalties for tokens that stand in a sequence already."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from common.messages.requests import Sampling

_LEAST, _MOST = 0.01, 100.0
"""Repetition penalties beyond these act as these."""


def penalise_into(logits: Tensor, tokens: Sequence[int], prompt_tokens: int, sampling: Sampling) -> None:
    """Change `logits` [vocab], float32 on the CPU, in place.

    Repetition (prompt and output, once each): divides positive logits, multiplies negative ones.
    Frequency and presence (output only): subtract per occurrence, and once.
    Nothing is sorted: each occurrence of a token writes the same new value. Very large logits may become infinite.
    """
    counted = bool(sampling.frequency_penalty or sampling.presence_penalty)
    repeated = sampling.repetition_penalty != 1.0
    if not repeated:
        tokens, prompt_tokens = tokens[prompt_tokens:], 0
    if not tokens or not (counted or repeated):
        return
    row = logits.numpy()  # the same memory; thousands of single places are quicker to reach this way
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    with np.errstate(over="ignore"):
        if repeated:
            penalty = np.float32(min(max(sampling.repetition_penalty, _LEAST), _MOST))
            scores = row[ids]
            row[ids] = np.where(scores > 0, scores / penalty, scores * penalty)
        if counted and len(tokens) > prompt_tokens:
            generated = ids[prompt_tokens:]
            counts = np.bincount(generated)[generated]
            row[generated] -= (sampling.frequency_penalty * counts + sampling.presence_penalty).astype(np.float32)
