"""What moves KV between the memories of a pure world: the copier of hand-overs, and the block mover."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.ids import PeerId
from services.worker.core.actions import FetchBlocks, Moved, StoreBlocks
from services.worker.core.host_buffer import HOST_BUFFER
from tests.support.world_memory import Memory
from tests.support.world_process import Process

if TYPE_CHECKING:
    from tests.support.world_cluster import Cluster


class Copies:
    """Each event is one span, one layer or one job of one process. Here nothing ends a permission too early."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def copy(self, process: Process) -> None:
        """The copier: one span."""
        cluster, copy = self._cluster, process.copies.popleft()
        order, contents = copy.order, process.memory.read_all(copy.source_pages)
        target = cluster.process(order.to)
        ok = target is not None
        if cluster.transport == "tcp":
            process.payloads[order.transfer, order.span] = contents
        elif target is not None:
            target.memory.write_all(order.target_pages, contents)
        moved = Moved(ok, 1.0, 1, len(contents) * cluster.layout.page_bytes)
        cluster.perform(process, process.core.on_copied(order.transfer, order.span, moved, cluster.now_ms))

    def require_permission(self, process: Process, order: FetchBlocks | StoreBlocks) -> None:
        """A layer, or all, of an order is about to be moved. Raises AssertionError if it may not be."""

    def move(self, process: Process) -> None:
        """The block mover: one layer of a fetch by layer, else a whole job."""
        cluster, move = self._cluster, process.next_move
        peer = move.order.peer
        memory = process.host if peer == HOST_BUFFER else self._memory_of(peer)
        order, by_layer = move.order, isinstance(move.order, FetchBlocks) and move.order.by_layer
        width = order.own_pages.shape[1]
        layers = [move.next_layer] if by_layer else list(range(width))
        ok = memory is not None and not move.broken and cluster.rng.random() >= cluster.flaky
        own, theirs = order.own_pages[:, layers].ravel().tolist(), order.peer_pages[:, layers].ravel().tolist()
        if ok and memory is not None:
            self.require_permission(process, order)
            if isinstance(order, StoreBlocks):
                memory.write_all(theirs, process.memory.read_all(own))
            else:
                process.memory.write_all(own, memory.read_all(theirs))
                ok = cluster.now_ms <= order.deadline_ms
        move.next_layer = layers[-1] + 1
        if by_layer:
            fetched = process.core.on_layer_fetched(order.call, layers[-1], ok=ok, now_ms=cluster.now_ms)
            cluster.perform(process, fetched)
        if not ok or move.next_layer == width:
            process.moves.remove(move)
            process.free_ring(order)
            moved = Moved(ok, 1.0, 1, order.own_pages.size * cluster.layout.page_bytes)
            cluster.perform(process, process.core.on_blocks_moved(order.call, moved, cluster.now_ms))

    def _memory_of(self, peer: PeerId) -> Memory | None:
        store, found = self._cluster.store, self._cluster.process(peer)
        if store is not None and store.peer == peer:
            return store.memory
        return None if found is None else found.memory
