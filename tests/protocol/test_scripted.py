"""Single stories of what goes wrong between real cores, each with the law that it would break."""

from collections import Counter
from collections.abc import Callable

import pytest

from common.faults.rules import parse_rules
from common.messages.handover import Grant, GrantPending, GrantRequest, Stop
from services.worker.core.actions import FetchBlocks
from tests.protocol.schedule import LEASE_MS, Schedule, random_schedule
from tests.support.world_process import Process

PROMPT, ANSWER = 21, 6


def arm(schedule: Schedule, text: str) -> None:
    schedule.faults(parse_rules(text))


def until(schedule: Schedule, happened: Callable[[], bool]) -> None:
    schedule.world.run(5_000.0, until=happened)
    assert happened(), "the story does not begin"


def ask_all(schedule: Schedule, n: int) -> None:
    """Prompts with one beginning, one after the other: prefill workers take turns."""
    for _ in range(n):
        schedule.ask(PROMPT, ANSWER, shared=True)
        schedule.world.run(5_000.0, until=lambda: not schedule.open_requests())
        schedule.time(300.0)


def moves(process: Process, kind: type) -> bool:
    return any(isinstance(move.order, kind) for move in process.moves)


@pytest.mark.parametrize("seed", range(2))
def test_a_reader_that_was_stopped_reads_on_within_its_lease(seed: int) -> None:
    """Its holder has hung up meanwhile, and does not know whether it is dead."""
    schedule = Schedule(seed, "pd2-shm-hints")
    holder, reader = schedule.world.processes["prefill"], schedule.world.processes["prefill-1"]
    ask_all(schedule, 1)
    if not len(holder.core.pool.cache):
        holder, reader = reader, holder
    arm(schedule, "prefill/fetch: delay ms=4500")
    schedule.ask(PROMPT, ANSWER, shared=True)
    until(schedule, lambda: moves(reader, FetchBlocks))
    schedule.world.kernel.stop(reader.peer)
    schedule.time(4_000.0)
    assert holder.core.pool.cache.n_pinned, "the lease has 10 s"
    schedule.end()


@pytest.mark.parametrize("seed", range(2))
def test_a_reservation_ends_although_its_publish_is_lost_again_and_again(seed: int) -> None:
    schedule = Schedule(seed, "pd2-shm-store")
    arm(schedule, "prefill/spill: drop side=sent after=1 times=4")
    ask_all(schedule, 1)
    schedule.end()


@pytest.mark.parametrize("seed", range(2))
def test_a_found_that_comes_twice_does_not_end_the_lease_that_is_in_use(seed: int) -> None:
    schedule = Schedule(seed, "pd-shm-returns")
    arm(schedule, "lookup: duplicate; fetch: delay ms=300")
    for _ in range(2):
        schedule.ask(PROMPT, 12)
        schedule.time(1_500.0)
    schedule.end()


@pytest.mark.parametrize("system", ["pd2-shm-store", "pd2-shm-hints"])
def test_what_could_not_be_fetched_is_computed(system: str) -> None:
    schedule = Schedule(1, system)
    arm(schedule, "fetch: fail")
    ask_all(schedule, 4)
    assert schedule.world.wires.injected["fetch:fail"]
    schedule.end()


def test_what_was_not_copied_to_a_store_is_not_read_from_there() -> None:
    schedule = Schedule(1, "pd2-shm-store")
    arm(schedule, "spill: fail times=1 side=work")
    ask_all(schedule, 4)
    assert schedule.world.wires.injected["spill:fail"]
    schedule.end()


def test_pages_on_their_way_to_a_store_stay_what_they_are() -> None:
    schedule = Schedule(1, "pd2-shm-store")
    arm(schedule, "prefill/spill: delay ms=1500 side=work")
    for _ in range(2):
        schedule.ask(30, 2)
        schedule.time(400.0)
    schedule.end()


def test_nothing_is_granted_to_a_writer_that_died_before_it_was_heard() -> None:
    schedule = Schedule(1, "pd-shm")
    world = schedule.world
    prefill, decode = world.processes["prefill"].peer, world.processes["decode"].peer

    def asks() -> bool:
        parcels = world.links.get((prefill, decode), ())
        return any(isinstance(parcel.message, GrantRequest) for parcel in parcels)

    schedule.ask(PROMPT, ANSWER)
    until(schedule, asks)
    assert world.gateway is not None
    world.die(world.gateway.peer)  # or it would say Cancel
    world.die(prefill)
    world.start_gateway()
    world.start("prefill")
    schedule.time(1_000.0)
    schedule.end()


@pytest.mark.parametrize("system", ["pd-shm", "pd-tcp"])
def test_pages_of_a_grant_that_cannot_be_sent_do_not_wait_for_its_lease(system: str) -> None:
    schedule = Schedule(1, system)
    world = schedule.world
    arm(schedule, "decode/grant: fail side=sent")
    schedule.ask(PROMPT, ANSWER)
    until(schedule, lambda: "grant:fail" in world.wires.injected)
    assert world.gateway is not None
    world.die(world.gateway.peer)  # or it would say Cancel
    core = world.processes["decode"].core
    assert core.pool.available_pages < core.pool.usable_pages, "the story does not begin"
    schedule.time(5_200.0)
    assert core.pool.available_pages == core.pool.usable_pages
    world.start_gateway()
    schedule.end()


@pytest.mark.parametrize(("refused", "again"), [(1, False), (9, True)])
def test_a_grant_that_cannot_be_sent_now_is_sent_when_it_is_asked_for_again_else_the_request_is(
    refused: int, again: bool
) -> None:
    schedule = Schedule(1, "pd-shm")
    arm(schedule, f"decode/grant: fail side=sent times={refused}")
    schedule.ask(PROMPT, ANSWER)
    schedule.time(2_500.0)
    gateway = schedule.world.gateway
    assert gateway is not None and bool(gateway.clients["r0"].finish) != again
    schedule.time(25_000.0)
    retried = any(name.startswith("retries_total") for name in gateway.core.counters())
    assert gateway.clients["r0"].finish and retried == again
    schedule.end()


def test_a_life_whose_name_was_taken_gets_no_new_work_and_ends_empty() -> None:
    """A prefill worker that has not read the membership since hears of a decode worker that it does not know yet."""
    schedule = Schedule(1, "pd-shm")
    world = schedule.world
    old, prefill = world.processes["decode"], world.processes["prefill"].peer
    world.kernel.stop(old.peer)
    world.kernel.stop(prefill)
    world.start("decode")
    world.kernel.go_on(old.peer)
    until(schedule, lambda: world.gateway.core.not_ready_reason(world.now_ms) is None)
    schedule.ask(PROMPT, ANSWER)
    world.kernel.go_on(prefill)
    schedule.time(6_000.0)
    assert old.core.succession.successor == world.processes["decode"].peer
    assert world.gateway.clients["r0"].finish and not old.core._generation.generated_tokens_total
    schedule.end()


def test_random_schedule_1054() -> None:
    """An old life of the decode worker took requests over whose gateway had hung up on it."""
    random_schedule(1054, more=False)


@pytest.mark.parametrize(
    "lost",
    [
        "route: drop times=1 side=sent",
        "decode/answer: drop times=1 side=sent",
        "decode/answer: drop after=5 times=1 side=sent",
        "answer: drop times=2; grant: drop times=1",
    ],
    ids=["Generate", "first Tokens", "last Tokens", "questions too"],
)
def test_what_a_gateway_and_its_workers_say_of_a_request_may_be_lost_and_costs_seconds(lost: str) -> None:
    """Its deadline is 30 s away."""
    schedule = Schedule(1, "pd-shm")
    arm(schedule, lost)
    schedule.ask(PROMPT, ANSWER)
    schedule.world.run(20_000.0, until=lambda: not schedule.open_requests())
    assert schedule.world.gateway.clients["r0"].finish, "no answer yet"
    schedule.end()


@pytest.mark.parametrize("lost", ["decode-0/answer: drop", "prefill/answer: drop side=sent; decode-0/grant: drop"])
def test_a_worker_whose_answers_are_lost_for_ever_costs_a_request_seconds(lost: str) -> None:
    """Its reports come, so nobody takes it for dead; the other decode worker is well."""
    schedule = Schedule(1, "pd2-tcp-store", timeout_ms=600_000.0)
    arm(schedule, lost)
    for _ in range(2):
        schedule.ask(PROMPT, ANSWER)
    schedule.world.run(30_000.0, until=lambda: not schedule.open_requests())
    gateway = schedule.world.gateway
    assert gateway is not None and all(client.finish for client in gateway.clients.values()), "no answer yet"
    assert gateway.core.counters()["unanswered_attempts_total"] == 1
    schedule.end()


def test_a_request_that_only_takes_its_time_is_asked_about_and_not_tried_again() -> None:
    schedule = Schedule(1, "pd-shm")
    arm(schedule, "prefill/transfer: delay ms=14000 side=work")
    schedule.ask(PROMPT, ANSWER)
    schedule.time(13_500.0)
    assert schedule.open_requests(), "the story does not begin"
    schedule.end()
    assert not {"lost_attempts_total", "unanswered_attempts_total"} & schedule.world.gateway.core.counters().keys()
    assert schedule.world.gateway.clients["r0"].finish


@pytest.mark.parametrize(
    ("system", "role", "heard"),
    [
        ("pd-shm", "decode-0", "GrantRequest"),
        ("pd-tcp", "prefill-0", "Generate"),
        ("pd-tcp", "decode-0", "Report"),
        ("pd2-shm-store", "kvstore-0", "Reserve"),
    ],
)
def test_what_was_meant_for_a_life_that_died_harms_nobody_when_the_next_one_hears_it(
    system: str, role: str, heard: str
) -> None:
    """Connections come back by themselves when a new life listens at the old address; the membership tells later."""
    inherited = Counter[str]()
    for n_events in (4, 40):
        schedule = Schedule(n_events, system)
        world = schedule.world
        schedule.ask(PROMPT, ANSWER, shared=True)
        schedule.events(n_events)
        world.die(next(peer for peer in world.everybody() if peer.startswith(role)))
        schedule.events(3)
        schedule.restart(0, same_address=True, unseen_ms=1_200.0)
        schedule.ask(PROMPT, ANSWER, shared=True)
        schedule.time(2_000.0)
        schedule.end()
        inherited.update(world.wires.inherited)
    assert inherited.keys() >= {"Ping", "Report", heard}, inherited


def test_a_life_takes_nothing_for_its_own_that_was_written_to_the_one_before_it() -> None:
    """A prefill worker that was stopped asks again, hears the grant of a life that is dead, and fills its memory. The next
    life hears that when it has welcomed the prefill worker and is mapped, since the older connection is late: it grants pages
    of its own, and must not believe that they were written."""
    schedule = Schedule(1, "pd-shm")
    world = schedule.world
    prefill, dead = world.processes["prefill"].peer, world.processes["decode"].peer
    schedule.ask(PROMPT, ANSWER)
    until(schedule, lambda: any(isinstance(p.message, Grant) for p in world.links.get((dead, prefill), ())))
    world.kernel.stop(prefill)
    schedule.time(2_100.0)
    world.die(dead)
    schedule.restart(0, same_address=True, unseen_ms=200.0)
    arm(schedule, "decode/grant: delay ms=350 side=heard times=1")
    world.kernel.go_on(prefill)
    world.tick()
    schedule.time(3_000.0)
    assert {"GrantRequest", "KvSent", "HandOver"} <= world.wires.inherited.keys()
    stops = [event for event in world.trace.events if isinstance(event.what, Stop) and event.what.code == "wrong_epoch"]
    assert stops, "the story does not begin"
    schedule.end()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_cancel_that_is_lost_costs_seconds_and_not_the_time_of_the_request(lost: int) -> None:
    """Its deadline is 30 s away, and nobody sends tokens of it, so that the gateway would hear that it goes on."""
    schedule = Schedule(1, "pd-shm")
    arm(schedule, f"gateway/cancel: drop times={1 + lost}; prefill/grant: drop side=sent")
    schedule.ask(PROMPT, ANSWER)
    schedule.events(20)
    schedule.leave(0)
    core = schedule.world.processes["prefill"].core
    assert not core.idle, "the story does not begin"
    schedule.world.run(2_500.0 * lost, until=lambda: core.idle)
    assert core.idle, "it waits for pages for nobody"
    schedule.end()


@pytest.mark.parametrize(
    ("system", "lost", "n_requests"),
    [("pd2-tcp-store", "decode-0/grant: drop", 12), ("pd-tcp", "decode/grant: drop side=sent times=6", 1)],
    ids=["heard by nobody, for ever", "granted, and not told"],
)
def test_a_decode_worker_that_answers_no_request_for_pages_costs_seconds_and_not_the_time_of_the_request(
    system: str, lost: str, n_requests: int
) -> None:
    """Its signs of life come all the while. There are two of them, or the next attempt is heard; two prompts at a time may
    ask one for pages, and those behind them do not wait in their turn."""
    schedule = Schedule(1, system, timeout_ms=120_000.0)
    arm(schedule, lost)
    for _ in range(n_requests):
        schedule.ask(9, ANSWER)
    schedule.world.run(15_000.0, until=lambda: not schedule.open_requests())
    gateway = schedule.world.gateway
    assert all(client.finish for client in gateway.clients.values()), "no answer yet"
    assert gateway.core.counters()["retries_total{code=peer_failed,kind=retry}"] in (1, 2)
    schedule.end()


def test_who_waits_for_pages_for_a_minute_is_told_so_and_not_tried_again() -> None:
    """All that the decode worker has is granted to a prompt whose copies last so long."""
    schedule = Schedule(1, "pd-shm", timeout_ms=120_000.0)
    arm(schedule, "prefill/transfer: delay ms=60000 side=work times=1")
    schedule.ask(40, ANSWER)
    schedule.ask(PROMPT, ANSWER)
    schedule.time(50_000.0)
    gateway = schedule.world.gateway
    assert [client.finish for client in gateway.clients.values()] == [None, None], "the story does not begin"
    schedule.time(15_000.0)
    assert all(client.finish for client in gateway.clients.values())
    pending = [event for event in schedule.world.trace.events if isinstance(event.what, GrantPending)]
    assert len(pending) > 20, "the story does not begin"
    assert not any(name.startswith("retries_total") for name in gateway.core.counters())
    schedule.end()


def test_a_transfer_that_lasts_longer_than_its_lease_is_renewed_and_not_stopped() -> None:
    schedule = Schedule(1, "pd-shm")
    arm(schedule, f"prefill/transfer: delay ms={2.5 * LEASE_MS:g} side=work")
    schedule.ask(PROMPT, ANSWER)
    schedule.time(2.6 * LEASE_MS)
    assert schedule.world.gateway.clients["r0"].finish
    schedule.end()
    assert not any(name.startswith("retries_total") for name in schedule.world.gateway.core.counters())
