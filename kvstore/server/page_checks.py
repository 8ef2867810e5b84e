"""Checksums of the pages of a store's memory under `--verify-kv`: kept for as long as a block lies there, and told with it.

A page's checksum is the one that its writer made of its own copy; what came without is given one when it comes, and a page
that was read from disk when its file has proved whole. So whoever reads a block compares it with what the first one had.
"""

import threading
import zlib
from array import array
from collections.abc import Sequence

from common.kv_layout import KvLayout
from common.messages.blocks import Publish, Put
from common.net.sockets import Payload
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.actions import Pages
from kvstore.transport.page_sums import page_sums

Row = tuple[int, ...]
"""crc32 of the pages of one block, layer by layer."""


class PageChecks:
    """Owns one checksum per page. Loop and disk threads use it, each for pages that the core gave to it alone."""

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory
        self._sums = array("L")
        self._page_bytes = self._layers = 0
        self._counting = threading.Lock()
        self._checked_pages = self._unchecked_pages = self._wrong_pages = 0
        self._accused = {False: 0, True: 0}  # blocks, by whether they were right

    def shape(self, layout: KvLayout, n_pages: int) -> None:
        """The memory was numbered in pages."""
        self._page_bytes, self._layers = layout.page_bytes, layout.layers
        self._sums = array("L", bytes(array("L").itemsize * n_pages))

    # -- what comes

    def on_put(self, message: Put, payloads: Sequence[Payload]) -> str:
        """Why a Put must be refused: what came is not what its checksums say; empty: it is right, or the core's to judge."""
        block_bytes = self._page_bytes * self._layers
        if not block_bytes or [len(one) for one in payloads] != [block_bytes] * len(message.blocks):
            return ""
        if not message.checksums:
            self._count(unchecked=len(payloads) * self._layers)
            return ""
        found = [self._of_payload(payload) for payload in payloads]
        return self._difference(message.checksums, found)

    def on_publish(self, message: Publish, pages: Sequence[Pages]) -> list[int]:
        """Pages that are not what their writer says it wrote; none: they are right, and their checksums are known from now on.

        Of a reservation that is gone there are no pages, and nothing to say.
        """
        if not pages:
            return []
        found = [self.make(row) for row in pages]
        if not message.checksums:
            self._count(unchecked=sum(len(row) for row in pages))
            return []
        if not self._difference(message.checksums, found):
            return []
        told = [*message.checksums, *((),) * len(pages)]
        return [
            page
            for row, sums, made in zip(pages, told, found, strict=False)
            for place, page in enumerate(row)
            if sums[place : place + 1] != made[place : place + 1]
        ]

    def written(self, pages: Pages, payload: Payload) -> None:
        """A payload, right as far as anybody knows, was copied into these pages."""
        self._keep(pages, self._of_payload(payload))

    def make(self, pages: Pages) -> Row:
        """What lies in these pages now is what shall lie there."""
        sums = self._of_memory(pages)
        self._keep(pages, sums)
        return sums

    # -- what leaves

    def of(self, blocks: Sequence[Pages]) -> tuple[Row, ...]:
        """As they are kept: what lies in the pages may be something else by now, which whoever reads them finds out."""
        return tuple(tuple(self._sums[page] for page in pages) for pages in blocks)

    def still_right(self, pages: Pages) -> bool:
        """A reader says that these pages came wrong: whether they are what they were when they came here."""
        right = self.of([pages]) == (self._of_memory(pages),)
        with self._counting:
            self._accused[right] += 1
        return right

    def before_disk(self, pages: Pages) -> str:
        """Why these pages must not become a file; empty: they are what they were when they came."""
        return self._difference(self.of([pages]), [self._of_memory(pages)])

    # -- counting

    def counters(self) -> dict[str, float]:
        """As in reports."""
        with self._counting:
            return {
                "kv_checked_pages_total": float(self._checked_pages),
                "kv_unchecked_pages_total": float(self._unchecked_pages),
                "kv_mismatches_total{path=spill}": float(self._wrong_pages),
                "kv_accused_blocks_total{here=wrong}": float(self._accused[False]),
                "kv_accused_blocks_total{here=right}": float(self._accused[True]),
            }

    def _difference(self, told: Sequence[Row], found: Sequence[Row]) -> str:
        """Compare and count. Also rows of another shape are a difference."""
        n_pages = sum(len(row) for row in found)
        flat = [one for row in told for one in row], [one for row in found for one in row]
        wrong = sum(one != other for one, other in zip(*flat, strict=False)) + abs(len(flat[0]) - len(flat[1]))
        self._count(checked=n_pages, wrong=wrong)
        return f"{wrong} of {n_pages} pages are not what their checksums say" if wrong else ""

    def _count(self, *, checked: int = 0, unchecked: int = 0, wrong: int = 0) -> None:
        with self._counting:
            self._checked_pages += checked
            self._unchecked_pages += unchecked
            self._wrong_pages += wrong

    def _keep(self, pages: Pages, sums: Row) -> None:
        for page, made in zip(pages, sums, strict=True):
            self._sums[page] = made

    def _of_payload(self, payload: Payload) -> Row:
        return page_sums(payload, self._page_bytes)

    def _of_memory(self, pages: Pages) -> Row:
        return tuple(zlib.crc32(self._memory.parts((page,))[0]) for page in pages)
