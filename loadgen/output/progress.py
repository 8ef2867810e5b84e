"""Live progress on standard error, for people: nothing is shown where standard error is not a terminal."""

import time
from collections import deque
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadgen.drive.processes import Progress as Ended

_RECENT_S, _REDRAW_S = 10.0, 0.25


class LiveProgress:
    """Ended requests, failures, and how the last seconds went. A context; `advance` is cheap enough for every request."""

    def __init__(self, title: str, n_requests: int | None, *, shown: bool) -> None:
        """`n_requests` None: nobody knows how many there will be."""
        count = SpinnerColumn() if n_requests is None else BarColumn(bar_width=24)
        columns = (
            TextColumn(title),
            count,
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        # Few redraws: they run in a thread of this process and take time from the event loop.
        self._progress = Progress(*columns, console=console, refresh_per_second=4, transient=True)
        self._progress.disable = not (shown and console.is_terminal)
        self._failed, self._shown_s = 0, 0.0
        self._recent: deque[tuple[float, Ended]] = deque()
        self._task = self._progress.add_task(title, total=n_requests, numbers="")

    def advance(self, ended: Ended) -> None:
        """Some requests ended."""
        if self._progress.disable:
            return
        now_s = time.monotonic()
        self._failed += ended.failed
        self._recent.append((now_s, ended))
        while self._recent[0][0] < now_s - _RECENT_S:
            self._recent.popleft()
        self._progress.update(self._task, advance=ended.ended)
        if now_s - self._shown_s > _REDRAW_S:
            self._shown_s = now_s
            self._progress.update(self._task, numbers=self._numbers(now_s))

    def _numbers(self, now_s: float) -> str:
        """The last ten seconds in a line."""
        span_s = max(now_s - self._recent[0][0], 1.0)
        requests = sum(ended.ended for _, ended in self._recent)
        tokens = sum(ended.output_tokens for _, ended in self._recent)
        ttfts_s = [ttft_s for _, ended in self._recent for ttft_s in ended.ttfts_s]
        ttft = "" if not ttfts_s else "  TTFT p50 {:.0f} p90 {:.0f} ms".format(*np.percentile(ttfts_s, [50, 90]) * 1e3)
        failed = f"  [red]{self._failed} failed[/]" if self._failed else ""
        return f"{requests / span_s:.1f} req/s  {tokens / span_s:.0f} tok/s{ttft}{failed}"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
