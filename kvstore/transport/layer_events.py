"""When a layer's KV is written, as a device knows it: marks in the engine's stream that copies wait for on the device.

The engine calls `record(layer)` right after it has launched what writes a layer's K and V, and goes on launching. Who
copies from these pages lets its own stream wait for the marks of its layers. Nobody waits on the host.

Why that is enough. A copy of a layer is ordered after the engine told of that layer (`on_layer`, called after
`record`), so the mark that `wait` finds is that one or a later one of the same stream; both come after the write.
A later one makes the copy wait longer, never too short. Pages that were filled by others need no mark: who fills them
(a peer's hand-over, a fetch, a received payload) waits for its copy on the host before anybody is told, so what is
launched after the news, on whatever stream, finds all bytes there.
"""

import threading
from collections.abc import Iterable
from typing import Protocol

import torch


class LayerEvents(Protocol):
    """One mark per layer. `record` is the engine's thread's; any thread may wait."""

    def record(self, layer: int) -> None:
        """The work launched so far in the calling thread's stream writes this layer's KV."""
        ...

    def wait(self, layers: Iterable[int] | None = None) -> None:
        """Let the calling thread's stream wait for the marks of these layers; None: of all. Returns at once."""
        ...


class NoLayerEvents:
    """For a CPU, where what was launched is done."""

    def record(self, layer: int) -> None:
        """Nothing to mark."""

    def wait(self, layers: Iterable[int] | None = None) -> None:
        """Nothing to wait for."""


class CudaLayerEvents:
    """One event per layer, recorded anew in every step. Not to be recorded while a graph is captured: after its launch."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()  # torch creates an event's handle at its first use, unguarded
        self._events = [torch.cuda.Event() for _ in range(layers)]
        self._recorded = [False] * layers

    def record(self, layer: int) -> None:
        """The work launched so far in the calling thread's stream writes this layer's KV."""
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            self._events[layer].record(stream)
            self._recorded[layer] = True

    def wait(self, layers: Iterable[int] | None = None) -> None:
        """Let the calling thread's stream wait for the marks of these layers; None: of all. Returns at once."""
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            for layer in range(len(self._events)) if layers is None else layers:
                if self._recorded[layer]:
                    stream.wait_event(self._events[layer])


def layer_events(layers: int, device: torch.device) -> LayerEvents:
    """Whichever fits the device."""
    return CudaLayerEvents(layers, device) if device.type == "cuda" else NoLayerEvents()
