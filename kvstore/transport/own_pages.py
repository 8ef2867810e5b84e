"""Whole pages between this process's pool, wherever it lies, and a peer's mapped memory."""

import torch

from common.errors import PeerFailed
from kvstore.memory.device import DevicePages
from kvstore.memory.page_pool import PagePool
from kvstore.transport.pages import Ids, as_ids, rows_of
from kvstore.transport.shared_pages import SharedPages

OwnPages = PagePool | DevicePages


def copy_out(own: OwnPages, own_pages: Ids, peer: SharedPages, peer_pages: Ids) -> int:
    """Ours into the peer's pages; returns how many contiguous pieces those were. Raises PeerFailed."""
    if isinstance(own, PagePool):
        return peer.write(peer_pages, own.rows, own_pages)
    try:
        joined = rows_of(own.read(as_ids(own_pages).tolist()), own.layout.page_bytes)
    except (torch.OutOfMemoryError, MemoryError) as error:  # a full device fails one copy, not the process
        raise PeerFailed(f"no memory to copy {len(own_pages)} pages out of the device: {error}") from error
    return peer.write(peer_pages, joined, range(len(joined)))


def copy_in(own: OwnPages, own_pages: Ids, peer: SharedPages, peer_pages: Ids) -> int:
    """The peer's pages into ours; returns how many contiguous pieces those were. Raises PeerFailed."""
    if isinstance(own, PagePool):
        return peer.read_into(own.rows, own_pages, peer_pages)
    try:
        own.write(as_ids(own_pages).tolist(), peer.read(peer_pages).reshape(-1).data)
    except (torch.OutOfMemoryError, MemoryError) as error:  # a full device fails one copy, not the process
        raise PeerFailed(f"no memory to copy {len(own_pages)} pages into the device: {error}") from error
    return 1 if len(own_pages) else 0
