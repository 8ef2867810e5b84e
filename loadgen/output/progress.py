"""A progress bar on standard error, for people: nothing is shown where standard error is not a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadgen.results.records import RequestRecord


class ProgressBar:
    """Counts ended requests, failures and tokens. A context; `advance` is cheap enough for every request."""

    def __init__(self, title: str, n_requests: int, *, shown: bool) -> None:
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed, {task.fields[tokens]} tokens"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        # Few redraws: they run in a thread of this process and take time from the event loop.
        self._progress = Progress(*columns, console=console, refresh_per_second=4, transient=True)
        self._progress.disable = not (shown and console.is_terminal)
        self._failed = self._tokens = 0
        self._task = self._progress.add_task(title, total=n_requests, failed=0, tokens=0)

    def advance(self, record: RequestRecord) -> None:
        """One request ended."""
        self._failed += record.outcome.failed
        self._tokens += record.output_tokens
        self._progress.update(self._task, advance=1, failed=self._failed, tokens=self._tokens)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
