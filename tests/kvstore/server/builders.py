"""Members, cores and block names for tests of the KV store."""

from typing import Any

from common.ids import Incarnation, PeerId, WorkerId
from common.kv_layout import KvLayout
from common.messages.liveness import Member, ModelIdentity
from kvstore.server.core.store import KvStoreCore

PEER = PeerId("prefill-0@1")
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")
BLOCK_BYTES = LAYOUT.layers * LAYOUT.page_bytes


def member(role: str = "kvstore", model: ModelIdentity | None = None) -> Member:
    return Member(
        id=WorkerId(f"{role}-0"), role=role, incarnation=Incarnation(1), endpoint="", host="h", pid=1, model=model
    )


def identity(**changes: Any) -> ModelIdentity:
    fields: dict[str, Any] = {
        "name": "m",
        "fingerprint": "f",
        "architecture": "Llama",
        "dtype": LAYOUT.dtype,
        "layers": LAYOUT.layers,
        "kv_heads": LAYOUT.kv_heads,
        "head_dim": LAYOUT.head_dim,
        "block_tokens": LAYOUT.block_tokens,
        "vocab_tokens": 100,
        "context_tokens": 100,
    }
    return ModelIdentity(**{**fields, **changes})


def core(capacity_blocks: int = 4, layout: KvLayout | None = LAYOUT) -> KvStoreCore:
    return KvStoreCore(member(), capacity_blocks * BLOCK_BYTES, layout)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")
