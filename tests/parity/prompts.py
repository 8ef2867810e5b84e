"""The prompts of the parity rows: from one token to three chunks of prefill, and a ragged batch."""

import random

CHUNK_TOKENS = 64
"""Small `--max-step-tokens` of the workers under test, so that short prompts cross several chunks."""


def twenty(vocab_tokens: int) -> list[list[int]]:
    """Twenty prompts: block borders, chunk borders, and sixteen ragged ones that can run as one batch."""
    rng = random.Random(20)
    lengths = [1, 16, 64, 3 * CHUNK_TOKENS] + [rng.randrange(2, 3 * CHUNK_TOKENS) for _ in range(16)]
    return [[rng.randrange(8, vocab_tokens) for _ in range(length)] for length in lengths]
