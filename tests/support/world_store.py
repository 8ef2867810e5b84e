"""A KV store in the pure world: its real core, with memory that remembers what was written."""

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.liveness import Member
from kvstore.server.core.actions import Reply, Write
from kvstore.server.core.store import Budget, KvStoreCore
from tests.support.world_memory import Memory, Page


class Store:
    """One life of a KV store."""

    def __init__(self, life: int, layout: KvLayout, n_blocks: int) -> None:
        self.member = Member(
            id=WorkerId("kvstore-0"), role="kvstore", incarnation=Incarnation(life), endpoint="x", host="h", pid=1
        )
        self.peer = peer_id(self.member.id, self.member.incarnation)
        self.core = KvStoreCore(self.member, Budget(n_blocks * layout.layers * layout.page_bytes), layout)
        self.memory = Memory(layout.block_tokens)
        self._layout = layout

    def hear(
        self, source: PeerId, message: AnyMessage, payloads: list[list[Page]], now_ms: float
    ) -> list[tuple[Message, list[list[Page]]]]:
        """Answers, with their payloads."""
        block_bytes = self._layout.layers * self._layout.page_bytes
        answers: list[tuple[Message, list[list[Page]]]] = []
        for action in self.core.on_message(source, message, [block_bytes] * len(payloads), now_ms):
            match action:
                case Write(pages, frame):
                    self.memory.write_all(pages, payloads[frame])
                case Reply(_, answer, blocks):
                    answers.append((answer, [self.memory.read_all(pages) for pages in blocks]))
        return answers
