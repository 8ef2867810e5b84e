"""Decisions of the KV store: message in, writes and replies out. No sockets, no memory, no clock.

Blocks are named by content and the name is salted by the model, so the store trusts any peer that can name a block and
keeps no record of peers. All blocks have one length: that of the model it was started for, else of the first Put.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ConfigError, ProtocolViolation
from common.ids import PeerId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.kvstore import Fetch, Fetched, Forget, Put, Stored
from common.messages.liveness import Hello, Member, PageCounts, Ping, QueueCounts, Refused, Report, Welcome
from common.units import format_bytes
from kvstore.server.core.block_index import BlockIndex

HASH_BYTES = 16
REPLY_LIMIT_BYTES = 64 * 2**20
"""An answer waits in memory outside the budget until it is sent; longer runs take several calls."""


@dataclass(frozen=True, slots=True)
class Write:
    """Copy the payload frame `frame` of the message in hand to a slot."""

    slot: int
    frame: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a message, followed by the bytes of `slots` as payload frames."""

    to: PeerId
    message: Message
    slots: tuple[int, ...] = ()


Action = Write | Reply


class KvStoreCore:
    """Owns the index of one store. The shell performs all actions of a call, in order, before the next call."""

    def __init__(self, mine: Member, capacity_bytes: int, layout: KvLayout | None) -> None:
        """`layout` is that of the model to be served, if it is known. Raises ConfigError if no block would fit."""
        self._mine, self._capacity_bytes, self._layout = mine, capacity_bytes, layout
        self._index = BlockIndex(0)
        self._block_bytes: int | None = None
        self._counters = dict.fromkeys(
            (
                "kv_hit_blocks_total",
                "kv_miss_blocks_total",
                "kv_evicted_blocks_total",
                "kv_refused_blocks_total",
                "kv_received_bytes_total",
                "kv_sent_bytes_total",
            ),
            0,
        )
        if layout is not None:
            block_bytes = layout.layers * layout.page_bytes
            if refusal := self._fix_block_bytes(block_bytes):
                raise ConfigError(f"--host-memory={format_bytes(capacity_bytes)} is too small: {refusal}")

    @property
    def block_bytes(self) -> int | None:
        """Length of every block; None until it is known."""
        return self._block_bytes

    @property
    def capacity_blocks(self) -> int:
        """Blocks that fit; 0 until their length is known."""
        return self._index.capacity_blocks

    def on_message(self, peer: PeerId, message: AnyMessage, frames_bytes: Sequence[int]) -> list[Action]:
        """Decide on one message; `frames_bytes` are the lengths of its payload frames. Raises ProtocolViolation."""
        match message:
            case Hello(member=member):
                return [Reply(peer, self._greet(member))]
            case Ping(sequence=sequence):
                return [Reply(peer, self.report(sequence))]
            case Put():
                return self._put(peer, message, frames_bytes)
            case Fetch():
                return [self._fetch(peer, message)]
            case Forget(call=call, blocks=blocks):
                return [Reply(peer, Stored(call=call, n_blocks=self._index.forget(blocks)))]
            case _:
                raise ProtocolViolation(f"a KV store got {type(message).__name__} from {peer}")

    def _greet(self, member: Member) -> Message:
        if self._layout is None or member.model is None:
            return Welcome(member=self._mine)
        differing = [
            f"{name}: {getattr(self._layout, name)!r} here, {getattr(member.model, name)!r} there"
            for name in ("layers", "kv_heads", "head_dim", "dtype", "block_tokens")
            if getattr(self._layout, name) != getattr(member.model, name)
        ]
        if differing:
            return Refused(text=f"{self._mine.id} keeps KV of another layout: {'; '.join(differing)}")
        return Welcome(member=self._mine)

    def _put(self, peer: PeerId, put: Put, frames_bytes: Sequence[int]) -> list[Action]:
        refusal = self._refusal(put, frames_bytes)
        if refusal:
            self._counters["kv_refused_blocks_total"] += len(put.blocks)
            return [Reply(peer, Stored(call=put.call, n_blocks=0, text=refusal))]
        placement = self._index.place(put.blocks)
        self._counters["kv_evicted_blocks_total"] += placement.evicted
        self._counters["kv_received_bytes_total"] += sum(frames_bytes[position] for position, _ in placement.writes)
        writes: list[Action] = [Write(slot, position) for position, slot in placement.writes]
        return [*writes, Reply(peer, Stored(call=put.call, n_blocks=placement.held))]

    def _refusal(self, put: Put, frames_bytes: Sequence[int]) -> str:
        if len(frames_bytes) != len(put.blocks):
            return f"{len(put.blocks)} blocks came with {len(frames_bytes)} payload frames; each needs one"
        if any(len(block) != HASH_BYTES for block in put.blocks):
            return f"a block's name must be {HASH_BYTES} bytes"
        if not put.blocks:
            return ""
        lengths = sorted(set(frames_bytes))
        if len(lengths) > 1:
            return f"blocks of {lengths[0]} and {lengths[-1]} bytes in one put; all must be equal"
        if self._block_bytes is None:
            return self._fix_block_bytes(lengths[0])
        if lengths[0] != self._block_bytes:
            return f"blocks of {lengths[0]} bytes; this store keeps blocks of {self._block_bytes} bytes"
        return ""

    def _fix_block_bytes(self, block_bytes: int) -> str:
        if block_bytes == 0:
            return "a block must not be empty"
        capacity_blocks = self._capacity_bytes // block_bytes
        if capacity_blocks == 0:
            return f"a block takes {block_bytes} bytes and the store has {self._capacity_bytes}"
        self._block_bytes, self._index = block_bytes, BlockIndex(capacity_blocks)
        return ""

    def _fetch(self, peer: PeerId, fetch: Fetch) -> Reply:
        block_bytes = self._block_bytes or 1
        slots = self._index.leading_run(fetch.blocks, max(1, REPLY_LIMIT_BYTES // block_bytes))
        rest = fetch.blocks[len(slots) :]
        more = bool(slots and rest and self._index.holds(rest[0]))
        self._counters["kv_hit_blocks_total"] += len(slots)
        self._counters["kv_miss_blocks_total"] += 0 if more else len(rest)  # the rest will be asked for again
        self._counters["kv_sent_bytes_total"] += len(slots) * block_bytes
        return Reply(peer, Fetched(call=fetch.call, hits=len(slots), more=more), slots)

    def report(self, sequence: int) -> Report:
        """State for whoever pinged; pages are counted in blocks."""
        held, total = self._index.held_blocks, self._index.capacity_blocks
        return Report(
            worker=self._mine.id,
            role=self._mine.role,
            incarnation=self._mine.incarnation,
            sequence=sequence,
            pages=PageCounts(total=total, free=total - held, cached=held),
            queue=QueueCounts(),
            counters={name: float(value) for name, value in self._counters.items()},
        )

    def check(self) -> None:
        """Raise AssertionError if a slot is lost or doubled."""
        self._index.check()
