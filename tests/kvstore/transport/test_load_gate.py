"""The gate holds the engine up exactly as long as a layer it needs is on its way."""

import queue
import threading
from collections.abc import Callable

import pytest

from common.errors import PeerFailed
from kvstore.transport.load_gate import LoadGate

WAIT_S = 30


def waiter(gate: LoadGate, calls: list[int], layer: int) -> Callable[[], bool]:
    """A thread that waits; the result says whether it got through, at once if it did already."""
    through: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wait() -> None:
        gate.wait(calls, layer)
        through.put(True)

    threading.Thread(target=wait, daemon=True).start()
    return lambda: through.get(timeout=WAIT_S)


def test_unknown_calls_and_no_calls_hold_nobody_up() -> None:
    gate = LoadGate(patience_s=0)
    gate.wait([], 3)
    gate.wait([1, 2], 3)
    gate.open(1, 0)
    gate.end(1)
    assert gate.calls == []


def test_a_layer_is_open_once_it_is_there_and_not_before() -> None:
    gate = LoadGate(patience_s=0)
    gate.begin(1)
    gate.begin(2)
    gate.open(1, 0)
    gate.wait([1], 0)
    for calls, layer in (([1], 1), ([1, 2], 0), ([2], 0)):
        with pytest.raises(PeerFailed, match=f"layer {layer} did not come"):
            gate.wait(calls, layer)
    gate.open(1, 2)
    gate.open(1, 1)
    gate.wait([1], 2)


def test_who_waits_is_woken_by_the_last_layer_that_was_missing() -> None:
    gate = LoadGate(WAIT_S)
    gate.begin(1)
    gate.begin(2)
    through = waiter(gate, [1, 2], 1)
    gate.open(1, 1)
    gate.open(2, 1)
    assert through()


def test_the_end_of_a_load_opens_everything_and_leaves_nothing() -> None:
    gate = LoadGate(WAIT_S)
    gate.begin(1)
    through = [waiter(gate, [1], layer) for layer in range(3)]
    gate.end(1)
    assert all(one() for one in through)
    assert gate.calls == []
    gate.begin(1)
    with pytest.raises(ValueError, match="load 1 has not ended"):
        gate.begin(1)
