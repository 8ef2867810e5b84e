"""Llama-2-13B on two H100s, as a router sees it: its shape, and what its steps cost by counting."""

from collections.abc import Sequence

from common.block_hash import BlockHash, hash_blocks, root_hash
from common.cost.step_cost import StepCost
from common.messages.liveness import ModelIdentity


def names(of: ModelIdentity, prompt: Sequence[int]) -> list[BlockHash]:
    """Of the prompt's blocks, as workers and gateway name them."""
    return hash_blocks(prompt, root_hash(of), of.block_tokens)


def model(block_tokens: int) -> ModelIdentity:
    """Llama-2-13B."""
    return ModelIdentity(
        name="llama-2-13b",
        fingerprint="13b",
        architecture="llama",
        dtype="float16",
        layers=40,
        kv_heads=40,
        head_dim=128,
        block_tokens=block_tokens,
        vocab_tokens=32_000,
        context_tokens=10**6,
    )


def roofline(*, tflops: float = 2 * 990 * 0.5, bytes_per_s: float = 2 * 3.35e12) -> StepCost:
    """Llama-2-13B on two H100s that reach half their peak, by counting.

    A token is multiplied with 13.0e9 weights: 26e9 FLOP. A pair of tokens is multiplied twice (scores, values) in each of 40
    layers with 5120 channels: 819e3 FLOP. A step reads all weights (26 GB); a decoding row reads 819 kB of KV per token.
    """
    weights, layers, channels, flops_per_ms = 13.0e9, 40, 5120, tflops * 1e12 / 1e3
    return StepCost(
        base_ms=2 * weights / bytes_per_s * 1e3,
        token_ms=2 * weights / flops_per_ms,
        pair_ms=4 * layers * channels / flops_per_ms,
        row_ms=2 * weights / flops_per_ms,
        kv_ms=2 * 2 * layers * channels / bytes_per_s * 1e3,
        chunk_tokens=1 << 20,
        n_samples=1,
    )
