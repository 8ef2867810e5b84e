"""The order in which one engine's work runs on its device: a CUDA stream, or the processor itself."""

import time
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the order of work."""

    @property
    def passed(self) -> bool:
        """Whether everything before it has ended."""
        ...

    def wait(self) -> None:
        """Return when everything before it has ended."""
        ...

    def since_ms(self, earlier: "Mark") -> float:
        """Time between an earlier mark and this one, both passed."""
        ...


class Lane(Protocol):
    """Everything done between `enter` and `leave` is queued in order; host and device meet only at marks."""

    def enter(self) -> None:
        """This thread's operators go to this lane from now on."""
        ...

    def leave(self) -> None:
        """Undo `enter`."""
        ...

    def host_buffer(self, n_bytes: int) -> Tensor:
        """[n_bytes] uint8 on the host, from which and to which copies run beside both processors."""
        ...

    def mark(self) -> Mark:
        """Where the work queued so far ends."""
        ...


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    @property
    def passed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def since_ms(self, earlier: Mark) -> float:
        assert isinstance(earlier, _CudaMark), "marks of one lane"
        return float(earlier._event.elapsed_time(self._event))


class CudaLane:
    """One stream of one GPU, of the higher priority, as the copies' streams are."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._entered: list[torch.cuda.StreamContext] = []

    def enter(self) -> None:
        """Operators of this thread are queued on the stream."""
        context = torch.cuda.stream(self.stream)
        context.__enter__()
        self._entered.append(context)

    def leave(self) -> None:
        """Back to the stream before."""
        self._entered.pop().__exit__(None, None, None)

    def host_buffer(self, n_bytes: int) -> Tensor:
        """Pinned memory."""
        return torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        """An event on the stream."""
        return _CudaMark(self.stream)


class _HostMark:
    passed = True

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def wait(self) -> None:
        pass

    def since_ms(self, earlier: Mark) -> float:
        assert isinstance(earlier, _HostMark), "marks of one lane"
        return (self._at_s - earlier._at_s) * 1e3


class HostLane:
    """The processor: what was called has ended."""

    def enter(self) -> None:
        """Nothing to do."""

    def leave(self) -> None:
        """Nothing to do."""

    def host_buffer(self, n_bytes: int) -> Tensor:
        """Plain memory."""
        return torch.zeros(n_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        """Now."""
        return _HostMark()


def open_lane(device: torch.device) -> Lane:
    """The lane of an engine on `device`."""
    return CudaLane(device) if device.type == "cuda" else HostLane()
