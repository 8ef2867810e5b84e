"""Small pools whose blocks say what they hold: every block is filled with a pattern made from its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from common.block_hash import BlockHash, hash_blocks, root_hash
from common.kv_layout import KvLayout
from kvstore import Address, MemPool, PoolOptions
from kvstore.pool.mem_pool import _identity
from kvstore.pool.tier import Bytes
from kvstore.pool.transfer import copy_blocks

LAYOUT = KvLayout(layers=3, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)
BLOCK_BYTES = LAYOUT.layers * LAYOUT.page_bytes


@dataclass
class HandClock:
    """Time that passes when the test says so."""

    time_ms: float = 0.0

    def now_ms(self) -> float:
        return self.time_ms


class CopyFailed(RuntimeError):
    """What a broken copy raises."""


@dataclass
class BreakingCopy:
    """Copies block by block; fails before block number `fails_at` (counted over all copies), and calls `during` before each."""

    fails_at: int | None = None
    done: int = 0
    during: list[object] = field(default_factory=list)

    def __call__(
        self, target: Bytes, target_blocks: Sequence[int], source: Bytes, source_blocks: Sequence[int]
    ) -> None:
        for pair in zip(target_blocks, source_blocks, strict=True):
            if self.done == self.fails_at:
                raise CopyFailed(f"block {self.done}")
            for watch in self.during:
                assert callable(watch)
                watch()
            copy_blocks(target, [pair[0]], source, [pair[1]])
            self.done += 1


def pool(
    device: int = 8,
    host: int = 8,
    *,
    instance: str = "a",
    clock: HandClock | None = None,
    copy: BreakingCopy | None = None,
    peers: Mapping[str, MemPool] | None = None,
) -> MemPool:
    options = PoolOptions(clock=clock or HandClock(), copy=copy or copy_blocks, peers={} if peers is None else peers)
    return MemPool.open(LAYOUT, device * BLOCK_BYTES, host * BLOCK_BYTES, instance=instance, options=options)


def names_of(tokens: Sequence[int], salt: str = "") -> list[BlockHash]:
    return hash_blocks(tokens, root_hash(_identity(LAYOUT, ""), salt), LAYOUT.block_tokens)


def pattern(name: bytes) -> Bytes:
    """[layers, page_bytes]"""
    pages = [blake2b(name + bytes([layer]), digest_size=LAYOUT.page_bytes).digest() for layer in range(LAYOUT.layers)]
    return np.frombuffer(b"".join(pages), np.uint8).reshape(LAYOUT.layers, -1)


def fill(one: MemPool, addresses: Sequence[Address], names: Sequence[bytes]) -> None:
    for address, name in zip(addresses, names, strict=True):
        for layer, page in enumerate(pattern(name)):
            one.write(address, layer, page.tobytes())


def holds(one: MemPool, addresses: Sequence[Address], names: Sequence[bytes]) -> bool:
    pairs = zip(addresses, names, strict=True)
    return all(np.array_equal(one.read(address), pattern(name)) for address, name in pairs)


def tokens_of(n_blocks: int, first: int = 0) -> list[int]:
    return [first, *range(1, n_blocks * LAYOUT.block_tokens)]
