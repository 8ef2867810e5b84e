"""The other process of the hand-over benchmark: shares its pages, and scatters a ring when it is told to.

    python -m benchmarks.gpu._handover_peer POOL_BYTES RUN_DIR

Prints the socket of its share. Then answers lines: `scatter SLOT FIRST COUNT` with `done`, `sum` with a checksum.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.page_mover import PageMover
from kvstore.transport.share import Share

PEER = PeerId("decode@1")
LAYOUT = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
SLOT_PAGES, SLOTS = 512, 4
"""The ring lies in the first pages of the pool."""


def rows_of(memory: PageMemory) -> Tensor:
    """All pages as bytes."""
    pages = memory.pages.tensor
    return pages.view(torch.uint8).view(len(pages), -1)


def scattered_pages(n_pages: int) -> np.ndarray:
    """Where the ring's pages go, in order: known to both sides. Blocks lie anywhere, their layers side by side."""
    ring_blocks = SLOT_PAGES * SLOTS // LAYOUT.layers
    blocks = np.random.default_rng(3).permutation(n_pages // LAYOUT.layers - ring_blocks) + ring_blocks
    return (blocks[:, None] * LAYOUT.layers + np.arange(LAYOUT.layers)).reshape(-1)


def main(pool_bytes: int, run_dir: Path) -> None:
    """Serve until standard input ends."""
    device = torch.device("cuda", 0)
    memory = open_page_memory(pool_bytes, LAYOUT, device)
    share = Share(PEER, on_joined=lambda peer: None, on_gone=lambda peer: None)
    mover, rows = PageMover(device), rows_of(memory)
    targets = scattered_pages(memory.pages.n_pages)
    print(share.serve(memory, run_dir), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "scatter":
            slot, first, count = (int(number) for number in numbers)
            with mover.launching():
                mover.move(rows, slot * SLOT_PAGES + np.arange(count), rows, targets[first : first + count])
            mover.finish()
            print("done", flush=True)
        else:
            print(int(rows.view(torch.int64).sum()), flush=True)
    share.close()
    memory.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
