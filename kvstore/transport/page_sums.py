"""crc32 of the pages in a buffer. Apart from `checksums`, because the MemPool library and the store need no torch."""

import zlib


def page_sums(pages: bytes | bytearray | memoryview, page_bytes: int) -> tuple[int, ...]:
    """Of the pages that lie in a buffer one after the other; it is contiguous."""
    whole = memoryview(pages).cast("B")
    return tuple(zlib.crc32(whole[low : low + page_bytes]) for low in range(0, len(whole), page_bytes))
