"""Copies of a pure world that fail or take their time by rule, each with the permission that it needs at that moment.

Who writes pages of another must be granted them; who reads is sure that their holder keeps them; what is copied out is
still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.faults.points import Kind, Point
from common.ids import Owner, PeerId
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import Copy, FetchBlocks, Moved, StoreBlocks
from services.worker.core.host_buffer import HOST_BUFFER
from tests.support.world_copies import Copies
from tests.support.world_memory import Page
from tests.support.world_process import Process

if TYPE_CHECKING:
    from tests.support.world_faults import FaultyWorld


class WatchedCopies(Copies):
    """Owns which orders will fail, when each may happen, and what was true when they began; all by id(order)."""

    def __init__(self, world: FaultyWorld) -> None:
        super().__init__(world)
        self._world = world
        self._due: dict[int, float] = {}
        self._broken: set[int] = set()
        self._own: dict[int, list[int]] = {}
        """Who had the pages that a FetchBlocks fills."""
        self._leaving: dict[int, list[Page]] = {}
        """What a StoreBlocks began to copy."""

    # -- rules

    def begin(self, process: Process, action: Copy | FetchBlocks | StoreBlocks) -> None:
        """Something is copied from now on; rules say how long it takes, and whether it fails."""
        match action:
            case Copy():
                self._strike(process, action, Point.TRANSFER, action.order.to)
            case FetchBlocks():
                self._strike(process, action, Point.PARK if action.peer == HOST_BUFFER else Point.FETCH, action.peer)
                self._own[id(action)] = _owners(process, action)
            case StoreBlocks():
                self._strike(process, action, Point.PARK if action.peer == HOST_BUFFER else Point.SPILL, action.peer)
                self._leaving[id(action)] = process.memory.read_all(action.own_pages.ravel().tolist())

    def _strike(self, process: Process, action: object, point: Point, peer: PeerId) -> None:
        outcome = self._world.wires.work(process.peer, point, peer)
        if not outcome.faults:
            return
        self._due[id(action)] = self._world.now_ms + outcome.ms_of(Kind.DELAY)
        if outcome.has(Kind.FAIL, Kind.CUT, Kind.CORRUPT):
            self._broken.add(id(action))

    def break_off(self, process: Process, peer: PeerId) -> None:
        """A process has unmapped a peer's memory: what waits to be copied there fails."""
        self._broken |= {id(copy) for copy in process.copies if copy.order.to == peer}
        process.break_moves(peer)

    def is_late(self, kind: str, process: Process) -> bool:
        """The copier's or the block mover's next event cannot happen yet."""
        order = process.copies[0] if kind == "copy" else process.next_move.order if kind == "move" else None
        return order is not None and self._due.get(id(order), 0.0) > self._world.now_ms

    def due_ms(self) -> list[float]:
        """When those that take their time may happen."""
        return list(self._due.values())

    # -- hand-overs

    def copy(self, process: Process) -> None:
        """The copier: one span. Who writes must be allowed to, at that moment."""
        world, copy = self._world, process.copies.popleft()
        order, contents = copy.order, process.memory.read_all(copy.source_pages)
        target, broken = world.process(order.to), id(copy) in self._broken
        self._broken.discard(id(copy))
        self._due.pop(id(copy), None)
        reached = target is not None or world.transport == "tcp" or world.kernel.maps_in_vain(process.peer, order.to)
        ok = not broken and reached
        pages = tuple((order.to, page) for page in order.target_pages)
        if not ok:
            what = f"    copy of {_span(order.span)} of {order.transfer} failed"
        elif world.transport == "tcp":
            process.payloads[order.transfer, order.span] = contents
            what = f"    copied {_span(order.span)} of {order.transfer}"
        else:
            what = f"    wrote {_span(order.span)} of {order.transfer} to pages {_few(order.target_pages)}"
        world.say(process.peer, order.to, what, (order.transfer,), pages)
        if ok and target is not None and world.transport != "tcp":
            self._require_granted(process, copy, target)
            target.memory.write_all(order.target_pages, contents)
        moved = Moved(ok, 1.0, 1, len(contents) * world.layout.page_bytes)
        world.perform(process, process.core.on_copied(order.transfer, order.span, moved, world.now_ms))
        process.payloads.clear()

    def _require_granted(self, process: Process, copy: Copy, target: Process) -> None:
        order, owner = copy.order, Owner(f"transfer/{copy.order.transfer}")
        allowed = target.ledger.pages_of(owner) if target.ledger.state_of(owner) is not None else []
        late = sorted(set(order.target_pages) - set(allowed))
        if late:
            owners = sorted({_owner_of(target, page) for page in late})
            text = f"{process.peer} wrote {_span(order.span)} of {order.transfer} into pages {late} of {order.to}"
            raise self._world.violation(
                f"{text}, which belong to {owners} now", (order.transfer, *owners), [(order.to, page) for page in late]
            )

    # -- blocks

    def move(self, process: Process) -> None:
        for move in process.moves:
            move.broken = move.broken or id(move.order) in self._broken
        before = {id(move.order) for move in process.moves}
        super().move(process)
        gone = before - {id(move.order) for move in process.moves}
        for order in gone:
            self._broken.discard(order)
            self._due.pop(order, None)
            self._own.pop(order, None)
            self._leaving.pop(order, None)

    def require_permission(self, process: Process, order: FetchBlocks | StoreBlocks) -> None:
        """What is read is kept by its holder as long as the reader believes; what is written is the writer's."""
        world, peer = self._world, order.peer
        if isinstance(order, StoreBlocks):
            now = process.memory.read_all(order.own_pages.ravel().tolist())
            if self._leaving.get(id(order)) != now:
                raise world.violation(f"{process.peer} copies pages out to {peer} that hold something else by now", ())
        if peer == HOST_BUFFER:
            return
        if isinstance(order, FetchBlocks) and self._own.get(id(order)) != _owners(process, order):
            raise world.violation(f"{process.peer} fetches into pages that have gone to others since", ())
        if world.now_ms <= getattr(order, "deadline_ms", world.now_ms):
            self._require_lease(process, order)

    def _require_lease(self, process: Process, order: FetchBlocks | StoreBlocks) -> None:
        world, peer = self._world, order.peer
        is_store = world.store is not None and peer == world.store.peer
        pool = self._pool_of(peer)
        if pool is None:
            return
        reads = isinstance(order, FetchBlocks)
        name = f"{'find:' if is_store else 'lent/'}{process.peer}{':' if is_store else '/'}{order.call}"
        owner = Owner(name if reads else f"write:{process.peer}:{order.call}")
        pages = order.peer_pages.ravel().tolist()
        held = pool.pins_of(owner) if reads else set(pages) <= set(pool.pages_of(owner))
        if not held:
            verb = "reads" if reads else "writes"
            raise world.violation(f"{process.peer} {verb} pages {_few(pages)} of {peer} without a lease ({owner})", ())

    def _pool_of(self, peer: PeerId) -> BlockPool | None:
        holder, store = self._world.process(peer), self._world.store
        if store is not None and peer == store.peer:
            shelves = store.core._shelves
            return None if shelves is None else shelves.pool
        return None if holder is None else holder.core.pool


def _owners(process: Process, order: FetchBlocks) -> list[int]:
    owners: list[int] = process.ledger._owner_of[order.own_pages.ravel()].tolist()
    return owners


def _span(span: object) -> str:
    return f"L{span.layer}+{span.n_layers} b{span.first_block}+{span.n_blocks}"  # type: ignore[attr-defined]


def _few(pages: Sequence[int]) -> str:
    return ",".join(map(str, pages[:12])) + (f" and {len(pages) - 12} more" if len(pages) > 12 else "")


def _owner_of(process: Process, page: int) -> str:
    """Who has a page now."""
    ledger = process.ledger
    owners = [owner for owner in ledger.owners() if page in ledger.pages_of(owner)]
    return owners[0] if owners else "nobody"
