"""A run spread over several generator processes, for servers that are faster than one process can ask.

All processes make the same plan from the same seed, take every n-th conversation of it, and start at the same moment of the
system's monotonic clock. Records come back at the end, so that sending them disturbs nothing.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from common.errors import ConfigError
from loadgen.drive.job import Driven, Driver, Job, Part
from loadgen.lifetime import ending_with
from loadgen.results.records import RequestRecord

START_AHEAD_S = 0.25
"""From the last process being ready to the run's start: all must have heard by then."""
_READY_WITHIN_S = 120.0
_TELL_EVERY_S = 0.25
OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """What ended since the last word."""

    ended: int = 0
    failed: int = 0
    output_tokens: int = 0
    ttfts_s: tuple[float, ...] = ()

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> "Progress":
        """What these records say."""
        return cls(
            len(records),
            sum(record.outcome.failed for record in records),
            sum(record.output_tokens for record in records),
            tuple(record.ttft_s for record in records if record.ttft_s is not None),
        )


class GeneratorDied(RuntimeError):
    """A generator process ended without its records."""


async def drive(job: Job, workers: int, on_progress: OnProgress) -> tuple[Driven, float]:
    """The whole job; also when it started, on the monotonic clock. Raises ConfigError or GeneratorDied."""
    load = job.load
    workers = min(workers, load.concurrency or workers, load.max_concurrency or workers)  # nobody's share may be none
    if workers == 1:
        driver = Driver(job, Part(), lambda record: on_progress(Progress.of([record])))
        start_s = time.monotonic()
        return await driver.drive(start_s), start_s
    return await _drive_apart(job, workers, on_progress)


async def _drive_apart(job: Job, workers: int, on_progress: OnProgress) -> tuple[Driven, float]:
    loop = asyncio.get_running_loop()
    children: list[tuple[Any, Connection]] = []  # Any: the context's process class

    def tell(progress: Progress) -> None:
        loop.call_soon_threadsafe(on_progress, progress)

    readers = ThreadPoolExecutor(workers)  # one each: a pipe that nobody reads would stop the process at its end
    try:
        for number in range(workers):
            children.append(_start(job, Part(number, workers)))
        pipes = [ours for _, ours in children]
        await asyncio.gather(*(loop.run_in_executor(readers, _await_ready, ours) for ours in pipes))
        start_s = time.monotonic() + START_AHEAD_S
        for ours in pipes:
            ours.send(start_s)
        parts = await asyncio.gather(*(loop.run_in_executor(readers, _collect, ours, tell) for ours in pipes))
        return _together(parts), start_s
    except GeneratorDied as error:
        ends = [f"{child.pid}: {child.exitcode}" for child, _ in children if child.exitcode is not None]
        raise GeneratorDied(f"{error} (exit codes of those that ended: {', '.join(ends) or 'none yet'})") from error
    finally:
        for child, ours in children:
            child.kill()  # those that are done do not mind
            child.join()
            ours.close()
        readers.shutdown(wait=False, cancel_futures=True)


def _start(job: Job, part: Part) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(job, part, theirs, os.getpid()), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C reaches us, and we end the child
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return child, ours


def _await_ready(pipe: Connection) -> None:
    if not pipe.poll(_READY_WITHIN_S):
        raise GeneratorDied(f"a generator process was not ready within {_READY_WITHIN_S:g} s")
    word = _receive(pipe)
    if isinstance(word, ConfigError):
        raise word


def _collect(pipe: Connection, tell: OnProgress) -> Driven:
    while True:
        word = _receive(pipe)
        if isinstance(word, Driven):
            return word
        tell(word)


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise GeneratorDied("a generator process died; its records are lost and so is the run") from error


def _together(parts: Sequence[Driven]) -> Driven:
    return Driven(
        records=tuple(record for part in parts for record in part.records),
        cpu_s=tuple(cpu_s for part in parts for cpu_s in part.cpu_s),
        wall_s=max(part.wall_s for part in parts),
        gap_s=parts[0].gap_s,
        answers_replaced=sum(part.answers_replaced for part in parts),
        turns_not_sent=sum(part.turns_not_sent for part in parts),
    )


def _child(job: Job, part: Part, pipe: Connection, parent_pid: int) -> None:
    ending_with(parent_pid, signal.SIGKILL)()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_drive_part(job, part, pipe))


async def _drive_part(job: Job, part: Part, pipe: Connection) -> None:
    teller = _Teller(pipe)
    try:
        driver = Driver(job, part, teller.on_record)
    except ConfigError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    start_s = await asyncio.to_thread(pipe.recv)
    driven = await driver.drive(start_s)
    teller.flush()
    pipe.send(driven)


class _Teller:
    """Passes progress on, but not for every request."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._told_s = pipe, time.monotonic()
        self._untold: list[RequestRecord] = []

    def on_record(self, record: RequestRecord) -> None:
        self._untold.append(record)
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(Progress.of(self._untold))
        self._untold, self._told_s = [], time.monotonic()
