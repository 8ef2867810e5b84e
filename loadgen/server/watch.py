"""Watches a server while a run runs: samples once a second, what it held before and after, whether anything leaked."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from loadgen.results.timeline import LeakCheck, ServerSample, ServerView
from loadgen.server.api import NoAnswer, ServerApi
from loadgen.server.leaks import DEADLINE_S, SETTLED_S, Held, check_leaks
from loadgen.server.probe import Probe
from loadgen.server.source import Source

_EVERY_S = 1.0


class Watch:
    """Samples while its `async with` block runs; `finish` ends that and gives the view. Never fails a run."""

    def __init__(self, api: ServerApi, probe: Probe, *, every_s: float = _EVERY_S) -> None:
        self._api, self._probe, self._every_s = api, probe, every_s
        self._samples: list[ServerSample] = []  # at_s on time.monotonic's clock
        self._before: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed_polls, self._last_failure = 0, ""
        self._no_leak_check = ""

    async def __aenter__(self) -> Self:
        if self._probe.source is not None:
            self._before = await self._look(self._probe.source)
            self._no_leak_check = f"before the run: {self._last_failure}" if self._before is None else ""
            self._task = asyncio.create_task(self._poll(self._probe.source))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def finish(
        self,
        start_s: float,
        *,
        leak_check: bool = True,
        settled_s: float = SETTLED_S,
        deadline_s: float = DEADLINE_S,
    ) -> ServerView:
        """Stop sampling and look whether everything was given back, for `deadline_s` at most; no `leak_check`: no wait.

        `start_s`: when the run started, on time.monotonic's clock; samples from before, as of a warm-up, are left out.
        """
        await self._stop()
        source = self._probe.source
        if source is None:
            return ServerView(source=self._probe.told, leak_check_failed=self._probe.failing if leak_check else "")
        last = await self._look(source)
        check, page = await self._leak_check(source, settled_s, deadline_s) if leak_check else (None, None)
        after = page or last
        return ServerView(
            source=self._probe.told,
            samples=tuple(replace(one, at_s=one.at_s - start_s) for one in self._samples if one.at_s >= start_s),
            failed_polls=self._failed_polls,
            poll_failure=self._last_failure,
            before=_document(source, self._before),
            after=_document(source, after),
            leak_check=check,
            leak_check_failed=self._no_leak_check if leak_check and check is None else "",
        )

    async def _poll(self, source: Source) -> None:
        due_s = time.monotonic()
        while True:
            await self._look(source)
            due_s = max(due_s + self._every_s, time.monotonic())  # slow answers skip polls, they do not bunch them
            await asyncio.sleep(due_s - time.monotonic())

    async def _look(self, source: Source) -> bytes | None:
        """One sample; its page. A failure is counted."""
        try:
            body = await self._api.get(source.path)
            self._samples.append(source.sample(body, time.monotonic()))
        except (NoAnswer, ValueError) as error:
            self._failed_polls += 1
            self._last_failure = str(error)
            return None
        return body

    async def _leak_check(
        self, source: Source, settled_s: float, deadline_s: float
    ) -> tuple[LeakCheck | None, bytes | None]:
        """And the last page that was looked at."""
        if self._before is None:
            return None, None
        pages: list[bytes] = []

        async def look() -> Held:
            try:
                body = await self._api.get(source.path)
                held = source.held(body)
            except (NoAnswer, ValueError) as error:
                self._no_leak_check = f"after the run: {error}"
                raise
            pages[:] = [body]
            return held

        check = await check_leaks(source.held(self._before), look, settled_s=settled_s, deadline_s=deadline_s)
        return check, pages[0] if pages else None

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()  # it ends by itself only through a bug of ours


def _document(source: Source, page: bytes | None) -> Mapping[str, object] | None:
    try:
        return None if page is None else source.document(page)
    except ValueError:
        return None
