"""What steps need, for tests: so many bytes for each row and each key. And what is ordered of their memory; and that it harmed nobody."""

from dataclasses import dataclass

from common.policy.elastic import ArenaTerms
from services.worker.core.actions import LendChunks, TakeBackChunks
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_process import CHUNK_PAGES, LAYOUT

CHUNK_BYTES = CHUNK_PAGES * LAYOUT.page_bytes


@dataclass(frozen=True, slots=True)
class Linear:
    fixed_bytes: int = 64
    row_bytes: int = 256
    key_bytes: int = 8

    def needs_bytes(self, rows: int, longest_keys: int) -> int:
        return self.fixed_bytes + rows * self.row_bytes + longest_keys * self.key_bytes

    def gathers_bytes(self, rows: int, longest_keys: int) -> int:
        del rows
        return longest_keys * self.key_bytes

    def rows_within(self, n_bytes: int, longest_keys: int) -> int:
        return max(0, n_bytes - self.needs_bytes(0, longest_keys)) // self.row_bytes


def arena_terms(
    *, max_rows: int = 64, least_rows: int = 9, max_keys: int = 100, step: Linear | None = None
) -> ArenaTerms:
    return ArenaTerms(
        step=step or Linear(),
        chunk_bytes=CHUNK_BYTES,
        chunk_pages=CHUNK_PAGES,
        max_rows=max_rows,
        least_rows=least_rows,
        max_keys=max_keys,
    )


class Orders:
    """Notes what is to move, and says `problem`."""

    def __init__(self) -> None:
        self._orders: list[LendChunks | TakeBackChunks] = []
        self.problem = ""

    def __call__(self, order: LendChunks | TakeBackChunks) -> str:
        self._orders.append(order)
        return self.problem

    def take(self) -> list[LendChunks | TakeBackChunks]:
        """Since the last call."""
        orders, self._orders = self._orders, []
        return orders


def require_unharmed(world: World) -> None:
    """Once all is settled: every request was answered rightly, and the laws of every process hold."""
    world.settle()
    for one in world.answers.values():
        assert one.failed is None
        assert one.tokens == answer(one.prompt, one.max_tokens)
    for process in world.processes.values():
        process.core.check()
        assert process.core.idle
