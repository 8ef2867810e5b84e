"""One process's part in a run: plan, connect, send, count. What `--workers` spreads over processes and one process does alone."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from loadgen.drive.bodies import BodyForm
from loadgen.drive.client import StreamingClient
from loadgen.drive.connection import Server
from loadgen.drive.runner import OnRecord, Run, RunPlan
from loadgen.results.records import RequestRecord
from loadgen.schedule.load import Load, mean_gap_s, planned, share_of, shared_out
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
    """Mean time between arrivals of the whole job; see `mean_gap_s`."""
    answers_replaced: int
    turns_not_sent: int


class Driver:
    """Does one part of a job. `prepare` once, then `run` once."""

    def __init__(self, job: Job, part: Part, on_record: OnRecord) -> None:
        """Belongs to the running event loop."""
        self._job, self._part, self._on_record = job, part, on_record
        self._client = StreamingClient(job.server, job.form.path, job.headers, job.timeout_s)

    def prepare(self) -> None:
        """Make the plan. Raises ConfigError."""
        job, part = self._job, self._part
        plan = planned(job.workload, job.load, job.seed)
        if job.load.concurrency is None:
            plan = list(plan)
            self._gap_s: float | None = mean_gap_s(plan)
        else:
            self._gap_s = 0.0
        self._plan = shared_out(plan, part.number, part.of)

    async def run(self, start_s: float) -> Driven:
        """Send this part; `start_s` is a time of the system's monotonic clock, the same for all parts."""
        job, part, load = self._job, self._part, self._job.load
        run = Run(
            self._client,
            RunPlan(
                run_id=job.run_id,
                form=job.form,
                start_s=start_s,
                max_in_flight=share_of(load.max_concurrency, part.number, part.of),
                stop_after_s=load.duration_s,
                with_sessions=job.with_sessions,
                first_index=part.number,
                index_step=part.of,
            ),
            self._on_record,
        )
        cpu_s, began_s = time.process_time(), time.monotonic()
        try:
            concurrency = share_of(load.concurrency, part.number, part.of)
            if concurrency is None:
                await run.open_loop(self._plan)
            else:
                await run.closed_loop(self._plan, concurrency)
        finally:
            self._client.close()
        return Driven(
            records=tuple(run.records),
            cpu_s=(time.process_time() - cpu_s,),
            wall_s=time.monotonic() - began_s,
            gap_s=self._gap_s,
            answers_replaced=run.answers_replaced,
            turns_not_sent=run.turns_not_sent,
        )
