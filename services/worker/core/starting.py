"""Which waiting sequences get their pages now. Pure."""

from services.worker.core.found import Load, Started
from services.worker.core.giving_way import GivingWay
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.layer_rings import LayerWise
from services.worker.core.lineup import Lineup
from services.worker.core.parking import Parking
from services.worker.core.prefix import PrefixReuse
from services.worker.core.retained import RetainedLayers
from services.worker.core.room import Room
from services.worker.core.sequence import Sequence


class Starting:
    """First come, first served; behind those that wait for the rest of their layers, prompts may start whose layers leave.

    Owns what has started since it was asked last.
    """

    def __init__(
        self,
        parts: tuple[PrefixReuse, Lineup, Room, Parking],
        offload: LayerWise,
        retained: RetainedLayers,
        way: GivingWay,
    ) -> None:
        self._reuse, self._lineup, self._room, self._parking = parts
        self._offload, self._retained, self._way = offload, retained, way
        self._started: list[Started] = []

    def take(self) -> list[Started]:
        """Who has got pages since the last call."""
        started, self._started = self._started, []
        return started

    def never(self, sequence: Sequence) -> None:
        """One that waited is over: what is parked of it is free, what other processes keep is given back as if not needed."""
        self._parking.forget(sequence.request)
        found = sequence.found
        if found is not None and found.peer != HOST_BUFFER:
            nothing = Load(sequence.request, found, found.first_block, sequence.table.blocks(0, 0))
            self._started.append(Started(sequence.request, 0, nothing))

    def admit(self) -> None:
        """Start whoever may."""
        waiting = self._lineup.waiting
        while waiting and self._begin(waiting[0]):
            pass
        for sequence in list(waiting):
            if self._offload.may_begin(sequence):
                self._offload.begin(sequence)
                self._started.append(Started(sequence.request, sequence.cached_blocks, None))
                self._lineup.run(sequence)

    def _begin(self, sequence: Sequence) -> bool:
        if self._parking.is_leaving(sequence.request) or not self._fits(sequence):
            return False
        load = self._retained.begin(sequence)
        if load is not None and load.n_blocks:
            sequence.awaits_load = not load.found.pages.size  # the engine can wait only for shared memory
        self._started.append(Started(sequence.request, sequence.cached_blocks, load))
        self._lineup.run(sequence)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        n_running, more = len(self._lineup.running), self._way.kept_blocks
        while True:
            n_blocks = self._retained.missing_blocks(sequence, self._reuse.new_blocks(sequence))
            if self._room.fits(n_blocks + more, n_running):
                return True
            at_best = self._reuse.new_blocks(sequence) - self._retained.kept_blocks
            if not self._room.fits(at_best + more, n_running) or not self._retained.let_go():
                return False
