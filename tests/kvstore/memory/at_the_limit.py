"""A process that has used up its mappings but for a few moves chunks, and says what became of it: one JSON object.

Run as a program, as no other test would live beside it. The memory is real, and so is the kernel's limit.
"""

import ctypes
import json
import threading
from collections.abc import Callable
from pathlib import Path

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from common.units import MIB
from kvstore.memory.lending import ChunkLending
from kvstore.memory.page_memory import PageMemory, open_page_memory

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
FREE = (0, 2, 5, 8, 12)
"""Mappings that are left when the order comes."""
Move = Callable[[ChunkLending], None]
MOVES: dict[str, tuple[Move, Move]] = {  # what comes before, and the order
    "first": (lambda _: None, lambda lending: lending.to_arena([5, 13, 9])),
    "lend": (lambda lending: _there_and_back(lending), lambda lending: lending.to_arena([5, 13, 9])),
    "take back": (lambda lending: lending.to_arena([3, 15, 11, 7]), lambda lending: lending.from_arena([11, 7])),
    "give away": (lambda lending: _there_and_back(lending), lambda lending: lending.to_system([5, 13, 9])),
    "fetch": (lambda lending: lending.to_system([5, 13, 9]), lambda lending: lending.from_system([13, 5])),
}


def _there_and_back(lending: ChunkLending) -> None:
    lending.to_arena([2, 6])
    lending.from_arena([2, 6])


class Mappings:
    """Owns as many as the kernel gives."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._held: list[int] = []

    def take_all_but(self, n_free: int) -> None:
        while True:
            access = len(self._held) % 2  # else neighbours would be one
            address = self._libc.mmap(None, 8192, access, 0x4022, -1, 0)
            if address == ctypes.c_void_p(-1).value:
                break
            self._held.append(address)
        self.free(n_free)

    def free(self, n_mappings: int) -> None:
        for _ in range(n_mappings):
            self._libc.munmap(self._held.pop(), 8192)


def state(memory: PageMemory, lending: ChunkLending) -> list[object]:
    home = memory.pages.memory
    areas = Path("/proc/self/maps").read_text().count("memfd:penstock-pages")
    here = [place for place in range(len(home.chunks)) if place not in home._away]
    pages_per_chunk = memory.plan.chunk_bytes // memory.plan.page_bytes
    first_bytes = [int(memory.pages.rows[place * pages_per_chunk, 0]) for place in here]  # no memory: the process dies
    return [sorted(home._away), lending.arena_bytes.numel(), memory.backend.live_mappings, areas, first_bytes]


def main() -> None:
    held, told = Mappings(), dict[str, list[str]]()
    for name, (before, order) in MOVES.items():
        for n_free in FREE:
            memory = open_page_memory(40 * MIB, LAYOUT)
            memory.pages.rows[:, 0] = 7
            lending = ChunkLending(memory.pages, memory.chunks, threading.Lock())
            before(lending)
            was, outcome = state(memory, lending), "moved"
            held.take_all_but(n_free)
            try:
                order(lending)
            except OutOfChunks as error:
                outcome = "undone" if "must be free before" not in str(error) else "not begun"
            held.free(400)
            if outcome != "moved" and state(memory, lending) != was:
                outcome = f"not as it was: {was}, {state(memory, lending)}"
            told.setdefault(name, []).append(outcome)
            if outcome != "moved":
                order(lending)  # once there are mappings
            lending.close()
            memory.close()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
