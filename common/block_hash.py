"""Names of token blocks: equal in every process, for equal tokens after equal tokens.

A block's hash is blake2b-128 of its parent's hash and its own tokens, so one hash stands for a whole prefix. The first
parent is the root: a hash of what the KV depends on beside the tokens (model, dtype, block length) and of the cache salt.
Prompts with different salts share no hash, and therefore no block.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType, Protocol

BlockHash = NewType("BlockHash", bytes)
"""16 bytes."""

HASH_BYTES = 16
_TOKEN_BYTES = 4


class KvIdentity(Protocol):
    """What KV depends on beside the tokens; a ModelIdentity of common.messages.liveness is one."""

    @property
    def fingerprint(self) -> str:
        """Of the model's config and weights."""
        ...

    @property
    def dtype(self) -> str:
        """Of weights and KV."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        ...


def root_hash(model: KvIdentity, salt: str = "") -> BlockHash:
    """The parent of every first block: one per model, KV dtype, block length and cache salt."""
    fields = (model.fingerprint, model.dtype, str(model.block_tokens), salt)
    whole = b"".join(struct.pack("<I", len(field.encode())) + field.encode() for field in fields)
    return BlockHash(blake2b(whole, digest_size=HASH_BYTES).digest())


def hash_blocks(tokens: Sequence[int], root: BlockHash, block_tokens: int) -> list[BlockHash]:
    """Hashes of the whole blocks of `tokens`, first to last; tokens after the last whole block do not count."""
    hashes: list[BlockHash] = []
    extend_hashes(hashes, tokens, root, block_tokens)
    return hashes


def extend_hashes(hashes: list[BlockHash], tokens: Sequence[int], root: BlockHash, block_tokens: int) -> None:
    """Append the hashes of whole blocks of `tokens` that `hashes` does not cover yet. Raises ValueError for what is no token."""
    first, end = len(hashes) * block_tokens, len(tokens) // block_tokens * block_tokens
    if end <= first:
        return
    try:
        packed = struct.pack(f"<{end - first}I", *tokens[first:end])
    except struct.error as error:
        raise ValueError(f"tokens must lie in 0 .. 2^32 - 1: {error}") from error
    step = block_tokens * _TOKEN_BYTES
    parent: bytes = hashes[-1] if hashes else root
    for at in range(0, len(packed), step):
        parent = blake2b(parent + packed[at : at + step], digest_size=HASH_BYTES).digest()
        hashes.append(BlockHash(parent))
