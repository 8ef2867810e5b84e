"""Members, cores and block names for tests of the KV store."""

from collections.abc import Sequence
from typing import Any, TypeVar

from common.ids import Incarnation, PeerId, WorkerId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.blocks import BlockName
from common.messages.liveness import Member, ModelIdentity
from kvstore.server.core.actions import Action, Reply
from kvstore.server.core.disk_format import disk_bytes
from kvstore.server.core.store import Budget, KvStoreCore

PEER = PeerId("prefill-0@1")
OTHER = PeerId("prefill-1@1")
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")
BLOCK_BYTES = LAYOUT.layers * LAYOUT.page_bytes
BLOCK_TOKENS = LAYOUT.block_tokens
FILE_BYTES = disk_bytes(LAYOUT)
M = TypeVar("M", bound=Message)


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


def core(
    capacity_blocks: int = 4, *, disk_blocks: int = 0, layout: KvLayout | None = LAYOUT, eviction: str = "lru"
) -> KvStoreCore:
    """PEER and OTHER map its memory; its disk, if any, was scanned and is empty."""
    made = KvStoreCore(member(), Budget(capacity_blocks * BLOCK_BYTES, disk_blocks * FILE_BYTES, eviction), layout)
    made.start()
    made.on_peer_joined(PEER, 0.0)
    made.on_peer_joined(OTHER, 0.0)
    if disk_blocks and layout is not None:
        made.on_disk_scanned([])
    return made


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block(number: int, parent: int | None = None, depth: int = 0) -> BlockName:
    """Block `number`, after `parent` (by default the number before it)."""
    return BlockName(name(number), name(number - 1 if parent is None else parent), depth)


def chain(*numbers: int) -> tuple[BlockName, ...]:
    """Blocks that follow each other in one chain, from its beginning."""
    parents = (0, *numbers)
    return tuple(block(number, parents[depth], depth) for depth, number in enumerate(numbers))


def answers(actions: Sequence[Action], kind: type[M]) -> list[M]:
    """The messages of one kind among some actions."""
    return [one.message for one in actions if isinstance(one, Reply) and isinstance(one.message, kind)]


def ask(kept: KvStoreCore, message: AnyMessage, kind: type[M], *, peer: PeerId = PEER, now_ms: float = 0.0) -> M:
    """The one answer to one message without payloads."""
    (answer,) = answers(kept.on_message(peer, message, [], now_ms), kind)
    return answer
