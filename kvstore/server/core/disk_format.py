"""Bytes of one block file: header, layout line, the block, checksum. Pure.

    magic 8 | version 4 | layout line's length 4 | depth 8 | block's length 8 | name 16 | parent 16 | crc32 4
    layout line | block, layer 0 first | blake2b-256 of everything before

The header's own crc32 lets a scan trust name, parent and depth without reading the block; whoever reads the block
checks all of it.
"""

import struct
import zlib
from hashlib import blake2b

from common.kv_layout import KvLayout
from common.messages.blocks import BlockName

VERSION = 2  # 1 had, in every page, all K before all V
CHECKSUM_BYTES = 32
_MAGIC = b"PENSTKKV"
_FIELDS = struct.Struct("<8sIIQQ16s16s")
_CRC = struct.Struct("<I")
_UNIT_BYTES = 4096  # what file systems give at a time


def layout_line(layout: KvLayout) -> bytes:
    """The layout as readable text."""
    return (
        f"layers={layout.layers} kv_heads={layout.kv_heads} head_dim={layout.head_dim} dtype={layout.dtype} "
        f"block_tokens={layout.block_tokens}\n"
    ).encode()


def file_header(block: BlockName, layout: KvLayout) -> bytes:
    """Everything before the block, layout line included; equally long for all blocks of one layout."""
    line, block_bytes = layout_line(layout), layout.layers * layout.page_bytes
    fields = _FIELDS.pack(_MAGIC, VERSION, len(line), block.depth, block_bytes, block.name, block.parent)
    return fields + _CRC.pack(zlib.crc32(fields + line)) + line


def header_bytes(layout: KvLayout) -> int:
    """Length of `file_header`."""
    return _FIELDS.size + _CRC.size + len(layout_line(layout))


def file_bytes(layout: KvLayout) -> int:
    """Length of a block's file."""
    return header_bytes(layout) + layout.layers * layout.page_bytes + CHECKSUM_BYTES


def disk_bytes(layout: KvLayout) -> int:
    """Room that a block's file takes on disk."""
    return -(-file_bytes(layout) // _UNIT_BYTES) * _UNIT_BYTES


def read_header(header: bytes, layout: KvLayout) -> BlockName | None:
    """The block that a whole header of this layout is for; None if it is anything else."""
    if len(header) != header_bytes(layout):
        return None
    _, _, _, depth, _, name, parent = _FIELDS.unpack_from(header)
    block = BlockName(name, parent, depth)
    return block if header == file_header(block, layout) else None


def checksum(header: bytes, parts: list[memoryview]) -> bytes:
    """The last bytes of a file."""
    digest = blake2b(header, digest_size=CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
