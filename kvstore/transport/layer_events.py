"""When a layer's KV is written, as a device knows it: marks in the engine's stream that copies wait for on the device.

The engine calls `record(layer)` right after it has launched what writes a layer's K and V, and goes on launching. Who
copies from these pages takes the `marks` of its layers when the copy is posted, and lets its own stream wait for them.
Nobody waits on the host.

Why that is enough. A copy of a layer is posted after the engine told of that layer (`on_layer`, called after `record`),
so the mark found then is that one or a later one of the same stream; both come after the write. A later one makes the
copy wait longer, never too short; it is found only if the engine launches the next step before the copy is posted.
Pages that were filled by others need no mark: who fills them (a peer's hand-over, a fetch, a received payload) waits
for its copy on the host before anybody is told, so what is launched after the news, on whatever stream, finds all bytes
there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Marks:
    """Places in the engine's stream. Any thread may wait for them, any number of times."""

    events: Sequence[torch.cuda.Event] = ()

    def wait(self) -> None:
        """Let the calling thread's current stream wait until they are passed. Returns at once."""
        for event in self.events:
            event.wait()


class LayerEvents(Protocol):
    """The last mark of each layer. `record` is the engine's thread's; any thread may ask."""

    def record(self, layer: int) -> None:
        """The work launched so far in the calling thread's stream writes this layer's KV."""
        ...

    def marks(self, layers: Iterable[int] | None = None) -> Marks:
        """The last marks of these layers; None: of all. Layers that were never recorded have none."""
        ...


class NoLayerEvents:
    """For a CPU, where what was launched is done."""

    def record(self, layer: int) -> None:
        """Nothing to mark."""

    def marks(self, layers: Iterable[int] | None = None) -> Marks:
        """Nothing to wait for."""
        return Marks()


class CudaLayerEvents:
    """A new event for each mark. Not to be recorded while a graph is captured: after its launch."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device = device
        self._last: list[torch.cuda.Event | None] = [None] * layers  # an event is not changed once it is here

    def record(self, layer: int) -> None:
        """The work launched so far in the calling thread's stream writes this layer's KV."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._last[layer] = event

    def marks(self, layers: Iterable[int] | None = None) -> Marks:
        """The last marks of these layers; None: of all."""
        last = self._last if layers is None else [self._last[layer] for layer in layers]
        return Marks([event for event in last if event is not None])


def layer_events(layers: int, device: torch.device) -> LayerEvents:
    """Whichever fits the device."""
    return CudaLayerEvents(layers, device) if device.type == "cuda" else NoLayerEvents()
