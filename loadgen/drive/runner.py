"""Sends a run's requests: open loop at planned times, or closed loop with a fixed number at a time."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from loadgen.drive.client import StreamingClient
from loadgen.results.records import RequestRecord
from loadgen.workload.random_prompts import PlannedRequest

OnRecord = Callable[[RequestRecord], None]


class Run:
    """One run against one server. `records` fills as requests end, in the order of their ends."""

    def __init__(self, client: StreamingClient, run_id: str, on_record: OnRecord) -> None:
        """`run_id` begins every request id of the run; `on_record` hears of each end and must return at once."""
        self._client, self._run_id, self._on_record = client, run_id, on_record
        self._start_s = client.now_s()
        self.records: list[RequestRecord] = []

    async def open_loop(self, requests: Sequence[PlannedRequest], schedule_s: Sequence[float]) -> None:
        """Send each request at its time, whatever became of the ones before; return when all have ended."""
        async with asyncio.TaskGroup() as group:
            for request, planned_s in zip(requests, schedule_s, strict=True):
                wait_s = self._start_s + planned_s - self._client.now_s()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._send(request, planned_s))

    async def closed_loop(self, requests: Sequence[PlannedRequest], concurrency: int) -> None:
        """Keep `concurrency` requests under way until all have ended."""
        waiting = iter(requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(self._send_each(waiting))

    async def _send_each(self, waiting: Iterator[PlannedRequest]) -> None:
        for request in waiting:
            await self._send(request, self._client.now_s() - self._start_s)

    async def _send(self, request: PlannedRequest, planned_s: float) -> None:
        request_id = f"{self._run_id}-{request.index}"
        record = await self._client.send(request, request_id, self._start_s, planned_s)
        self.records.append(record)
        self._on_record(record)
