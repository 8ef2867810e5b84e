import asyncio
import os
import signal

import psutil
import pytest

from common.errors import ConfigError
from loadgen.drive.bodies import BodyForm
from loadgen.drive.connection import parse_server
from loadgen.drive.job import Driven, Job
from loadgen.drive.processes import GeneratorDied, Progress, drive
from loadgen.results.records import Outcome
from loadgen.schedule.curves import Steady
from loadgen.schedule.load import Load
from tests.loadgen.fake_server import Answer, FakeServer, Script, fake_server, steady
from tests.loadgen.plans import Listed, Talks


def job(url: str, load: Load, workload: object = Talks(turns=2)) -> Job:
    return Job(
        server=parse_server(url),
        headers={},
        timeout_s=60.0,
        form=BodyForm(endpoint="completions", model="fake"),
        workload=workload,  # type: ignore[arg-type] # any workload
        load=load,
        seed=1,
        run_id="t",
    )


def driven(script: Script, load: Load, workers: int) -> tuple[Driven, FakeServer, list[Progress]]:
    async def run() -> tuple[Driven, FakeServer, list[Progress]]:
        told: list[Progress] = []
        async with fake_server(script) as fake:
            found, _ = await drive(job(fake.url, load), workers, told.append)
            return found, fake, told

    return asyncio.run(run())


def generators() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_one_process_does_the_whole_plan() -> None:
    found, fake, told = driven(steady(), Load(curve=Steady(500.0), n_requests=20), 1)
    assert len(found.records) == len(fake.seen) == sum(progress.ended for progress in told) == 20
    assert found.gap_s is not None and found.gap_s > 0


def test_an_interrupted_run_keeps_what_had_ended() -> None:
    async def run() -> Driven:
        ended = asyncio.Event()

        def one(number: int, body: dict[str, object]) -> Answer:
            return Answer(ending="hang") if number else steady()(number, body)

        async with fake_server(one) as fake:
            load = Load(curve=Steady(1e4), n_requests=3)
            driving = asyncio.create_task(drive(job(fake.url, load, Talks()), 1, lambda progress: ended.set()))
            await asyncio.wait_for(ended.wait(), 30)
            driving.cancel()
            return (await driving)[0]

    found = asyncio.run(run())
    assert (len(found.records), found.interrupted) == (1, True)


@pytest.mark.system
@pytest.mark.parametrize(
    ("load", "processes"),
    [
        (Load(curve=Steady(200.0), n_requests=21), 3),
        (Load(concurrency=5, n_requests=21), 3),
        (Load(concurrency=2, n_requests=21), 2),  # a third would have no part of the concurrency
        (Load(curve=Steady(200.0), n_requests=21, max_concurrency=1), 1),
    ],
)
def test_several_processes_send_every_request_of_the_plan_once(load: Load, processes: int) -> None:
    alone, _, _ = driven(steady(), load, 1)
    found, fake, told = driven(steady(), load, 3)
    assert len(found.records) == len(fake.seen) == sum(progress.ended for progress in told) == 21
    assert len({record.index for record in found.records}) == 21
    places = {(record.conversation, record.turn) for record in found.records}
    assert places == {(record.conversation, record.turn) for record in alone.records}
    assert all(record.outcome is Outcome.OK for record in found.records)
    assert len(found.cpu_s) == processes
    assert generators() == []


@pytest.mark.system
def test_a_generator_process_that_dies_ends_the_run_with_a_word_and_leaves_none_behind() -> None:
    def deadly(number: int, body: dict[str, object]) -> Answer:
        for child in generators():
            os.kill(child.pid, signal.SIGKILL)
        return Answer(ending="hang")

    with pytest.raises(GeneratorDied, match="died"):
        driven(deadly, Load(concurrency=2, n_requests=4), 2)
    assert generators() == []


@pytest.mark.system
def test_a_plan_that_cannot_be_made_is_told_by_any_process() -> None:
    async def run() -> None:
        await drive(job("http://127.0.0.1:1", Load(concurrency=1), Listed(())), 2, lambda progress: None)

    with pytest.raises(ConfigError, match="nothing would be sent"):
        asyncio.run(run())
