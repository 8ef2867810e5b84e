"""One process's part in a run: plan, connect, send, count. What `--workers` spreads over processes and one process does alone."""

import asyncio
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from loadgen.drive.bodies import BodyForm
from loadgen.drive.client import StreamingClient
from loadgen.drive.connection import Server
from loadgen.drive.runner import OnRecord, Run, RunPlan
from loadgen.results.records import RequestRecord
from loadgen.schedule.load import Load, planned, share_of, shared_out
from loadgen.workload.plan import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, whole. Plain data: it travels to other processes."""

    server: Server
    headers: Mapping[str, str] = field(repr=False)
    timeout_s: float
    form: BodyForm
    workload: Workload
    load: Load
    seed: int
    run_id: str
    starts_s: tuple[float, ...] | None = None
    """The conversations' own times, for a replay."""
    with_sessions: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a job: conversations are dealt out in turn."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """What came of a part, or of all of them together."""

    records: tuple[RequestRecord, ...]
    cpu_s: tuple[float, ...]
    """Per process."""
    wall_s: float
    gap_s: float | None
    """Mean time between arrivals of the whole job; see `Plan`."""
    answers_replaced: int
    turns_not_sent: int
    interrupted: bool = False
    """Somebody ended it; what was under way has no record."""


class Driver:
    """Does one part of a job, once."""

    def __init__(self, job: Job, part: Part, on_record: OnRecord) -> None:
        """Plans, and makes the first requests. Belongs to the running event loop. Raises ConfigError."""
        load = job.load
        plan = planned(job.workload, load, job.seed, job.starts_s)
        self._gap_s = plan.gap_s
        self._client = StreamingClient(job.server, job.form.path, job.headers, job.timeout_s)
        self._run = Run(
            self._client,
            RunPlan(
                run_id=job.run_id,
                form=job.form,
                concurrency=share_of(load.concurrency, part.number, part.of),
                max_in_flight=share_of(load.max_concurrency, part.number, part.of),
                stop_after_s=load.duration_s,
                with_sessions=job.with_sessions,
                first_index=part.number,
                index_step=part.of,
            ),
            shared_out(plan.conversations, part.number, part.of, load.concurrency),
            on_record,
        )

    async def drive(self, start_s: float) -> Driven:
        """Send this part; `start_s` is a time of the system's monotonic clock, the same for all parts."""
        gc.disable()  # a collection over the records of thousands of streams stops them all for 50 to 100 ms
        cpu_s, began_s, interrupted = time.process_time(), time.monotonic(), False
        try:
            await self._run.drive(start_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._run.records or task is None:
                raise
            task.uncancel()  # what has ended is worth a report; whoever interrupts once more ends that too
            interrupted = True
        finally:
            gc.enable()
            self._client.close()
        return Driven(
            records=tuple(self._run.records),
            cpu_s=(time.process_time() - cpu_s,),
            wall_s=time.monotonic() - began_s,
            gap_s=self._gap_s,
            answers_replaced=self._run.answers_replaced,
            turns_not_sent=self._run.turns_not_sent,
            interrupted=interrupted,
        )
