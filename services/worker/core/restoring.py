"""Parked KV on its way back from the host buffer, layer by layer, into the pages of sequences that have begun. Pure."""

from services.worker.core.actions import Action, FetchBlocks, Moved
from services.worker.core.found import Load
from services.worker.core.parking import Parking
from services.worker.core.scheduler import Scheduler


class Restoring:
    """Owns the loads from the buffer. Each is ended by the shell; what is worthless is computed again."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._loads: dict[int, Load] = {}

    @property
    def parking(self) -> Parking:
        """Where they come from."""
        return self._scheduler.parking

    def start(self, load: Load) -> list[Action]:
        """The sequence has its pages: fetch what of its blocks is not cached."""
        call = load.found.call
        self.parking.claim(load.request)
        layers = self._scheduler.retained.take_absent(call)
        if load.n_blocks == 0:
            self.parking.free(call)
            self.parking.restored_total += 1
            return []
        self._loads[call] = load
        own, theirs = load.own_pages, load.peer_pages
        if layers:
            own, theirs = own[:, list(layers)], theirs[:, list(layers)]
        return [FetchBlocks(call, load.found.peer, own, theirs, load.found.deadline_ms, by_layer=True, layers=layers)]

    def on_layer_failed(self, call: int) -> None:
        """A layer of a load is worthless; calls of others are ignored."""
        load = self._loads.get(call)
        if load is not None:
            self._scheduler.spoil(load.request)

    def on_moved(self, call: int, moved: Moved, now_ms: float) -> bool:
        """The shell has ended a copy from or to the buffer; False if the call is none of these."""
        load = self._loads.pop(call, None)
        if load is None:
            stored = self._scheduler.offload.on_moved(call, moved) or self.parking.on_moved(call, moved)
            if stored:
                self.parking.learn(moved, now_ms)
            return stored
        self.parking.fetched_bytes_total += moved.n_bytes
        if moved.ok:
            self.parking.restored_total += 1
        else:
            self.parking.failures_total += 1
            self._scheduler.spoil(load.request)
        self._scheduler.loaded(load.request)
        self.parking.free(call)
        return True

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {**self.parking.counters(), **self._scheduler.offload.counters()}

    @property
    def n_open(self) -> int:
        """Copies in progress, in either direction."""
        return len(self._loads) + self.parking.n_open + len(self._scheduler.offload.calls)

    def check(self) -> None:
        """Every host page is kept for somebody. Raises RuntimeError."""
        self.parking.check({*self._loads, *self._scheduler.offload.calls})
