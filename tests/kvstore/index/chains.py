"""Chains of blocks for tests of the index: names as prompts would have them, in a few salts."""

import random

import numpy as np

from common.block_hash import BlockHash, hash_blocks, root_hash
from common.messages.liveness import ModelIdentity
from common.policy.eviction import EvictionPolicy, Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageIds

BLOCK_TOKENS = 4
MODEL = ModelIdentity(
    name="m",
    fingerprint="f00d",
    architecture="llama",
    dtype="float32",
    layers=2,
    kv_heads=1,
    head_dim=4,
    block_tokens=BLOCK_TOKENS,
    vocab_tokens=100,
    context_tokens=1000,
)
ROOT = root_hash(MODEL)


def chain(tokens: list[int], salt: str = "") -> list[BlockHash]:
    """Names of the whole blocks of `tokens`."""
    return hash_blocks(tokens, root_hash(MODEL, salt), BLOCK_TOKENS)


def straight(n_blocks: int, first_token: int = 0) -> list[BlockHash]:
    """A chain that shares no block with that of another first token."""
    return chain([first_token, *range(1, n_blocks * BLOCK_TOKENS)])


def prompt(rng: random.Random, max_blocks: int = 6) -> list[int]:
    """Tokens of few kinds per block, so that prompts share prefixes and part again."""
    return [token for _ in range(rng.randrange(1, max_blocks + 1)) for token in [rng.randrange(2)] * BLOCK_TOKENS]


def block_pool(n_blocks: int, pages_per_block: int = 2, policy: EvictionPolicy | None = None) -> BlockPool:
    return BlockPool(Ledger(n_blocks * pages_per_block), pages_per_block, policy or Lru())


def no_pages() -> PageIds:
    return np.empty(0, np.int32)
