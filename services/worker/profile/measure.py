"""Runs the steps of a grid on the real engine, over real pages, and says how long they took."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.make import EngineLimits, make_engine
from services.worker.model.load import LoadedModel
from services.worker.profile.file import ProfilePoint
from services.worker.profile.grid import GridPoint

_FIRST_TOKEN = 5
"""Ids below it may be special."""


class StepTimer:
    """Owns the engine; the pages belong to the caller, and what they hold is lost."""

    def __init__(self, model: LoadedModel, pages: torch.Tensor, limits: EngineLimits) -> None:
        self._layout, self._vocab_tokens = model.layout, model.identity.vocab_tokens
        self._pages = pages
        self._engine = make_engine(model, pages, limits)
        self._engine.capture()
        self._steps = 0

    def fill(self, points: Sequence[GridPoint]) -> None:
        """Write to all pages that the points read: memory that nobody has written to is faster than it will ever be."""
        n_pages = max(point.rows * self._layout.pages_for(point.context + point.count) for point in points)
        self._pages[:n_pages].fill_(0.5)

    def time_ms(self, point: GridPoint) -> float:
        """Of one step."""
        return self.run([point])

    def run(self, points: Sequence[GridPoint]) -> float:
        """One step of several points together, decoding ones first; they must fit the pages together."""
        segments: list[Segment] = []
        first_page = 0
        for point in points:
            n_pages = self._layout.pages_for(point.context + point.count)
            for _ in range(point.rows):
                segments.append(self._segment(len(segments), point, first_page))
                first_page += n_pages
        self._steps += 1
        return self._engine.step(StepPlan(self._steps, tuple(segments))).compute_ms

    def _segment(self, number: int, point: GridPoint, first_page: int) -> Segment:
        end = point.context + point.count
        ids = np.arange(first_page, first_page + self._layout.pages_for(end), dtype=np.int32)
        table = PageTable(self._layout.layers)
        table.append(ids.reshape(-1, self._layout.layers))
        spread = self._vocab_tokens - _FIRST_TOKEN
        return Segment(
            request=RequestId(str(number)),
            tokens=[_FIRST_TOKEN + (number * 31 + at * 7) % spread for at in range(end)],
            prompt_tokens=end,
            start=point.context,
            count=point.count,
            table=table,
            sampling=Sampling(max_tokens=1),
            sample=True,
        )


def measure(
    timer: StepTimer, points: Sequence[GridPoint], rounds: int, on_round: Callable[[int], None]
) -> tuple[ProfilePoint, ...]:
    """Every point once per round, so that a disturbance hits many points once and none always. A first round warms up."""
    timer.fill(points)
    times: list[list[float]] = [[] for _ in points]
    for number in range(rounds + 1):
        on_round(number)
        for index, point in enumerate(points):
            ms = timer.time_ms(point)
            if number:
                times[index].append(ms)
    return tuple(_measured(point, ms) for point, ms in zip(points, times, strict=True))


def _measured(point: GridPoint, times_ms: list[float]) -> ProfilePoint:
    work = point.work
    return ProfilePoint(
        new_tokens=work.new_tokens,
        pairs=work.pairs,
        rows=work.rows,
        kv_tokens=work.kv_tokens,
        measured_ms=tuple(round(ms, 4) for ms in times_ms),
    )


def processor_name(device: torch.device) -> str:
    """What computes, for people and for comparing."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: the architecture is all there is
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
