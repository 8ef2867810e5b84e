"""Where the engine waits for KV that is still on its way."""

import threading
from collections.abc import Sequence

from common.errors import PeerFailed


class LoadGate:
    """Owns how far each running load has come, by its call. An entry lives from `begin` to `end`.

    Nothing is remembered of a load that has ended, well or not: an unknown call holds nobody up, and who waits for it
    when it ends is woken. That a load failed is told elsewhere, before `end`. Any thread may call.
    """

    def __init__(self, patience_s: float = 30.0) -> None:
        """`patience_s`: every load ends by its lease, so a longer wait can only be our own bug."""
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._layers_there: dict[int, int] = {}  # call -> layers 0 to n - 1 are there

    @property
    def calls(self) -> list[int]:
        """Loads that run or wait, oldest first."""
        with self._changed:
            return list(self._layers_there)

    def begin(self, call: int) -> None:
        """A load is about to be posted. Raises ValueError if this call was begun and has not ended."""
        with self._changed:
            if call in self._layers_there:
                raise ValueError(f"load {call} has not ended yet")
            self._layers_there[call] = 0

    def open(self, call: int, layer: int) -> None:
        """Layers up to `layer` may be read. Unknown calls are ignored."""
        with self._changed:
            if call in self._layers_there:
                self._layers_there[call] = max(self._layers_there[call], layer + 1)
                self._changed.notify_all()

    def end(self, call: int) -> None:
        """The load is over: nobody waits for any layer of it any more. Unknown calls are ignored."""
        with self._changed:
            self._layers_there.pop(call, None)
            self._changed.notify_all()

    def wait(self, calls: Sequence[int], layer: int) -> None:
        """Return when `layer` may be read, as far as these calls go. Raises PeerFailed after `patience_s`."""
        if not calls:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._all_there(calls, layer), self._patience_s):
                there = {call: self._layers_there[call] for call in calls if call in self._layers_there}
                raise PeerFailed(
                    f"layer {layer} did not come in {self._patience_s:.0f} s; layers there by call: {there}"
                )

    def _all_there(self, calls: Sequence[int], layer: int) -> bool:
        return all(self._layers_there.get(call, layer + 1) > layer for call in calls)
