"""A worker that stands still is seen and the youngest gives way; one that is only slow, or waits rightly, is left alone."""

import random
from collections import deque
from collections.abc import Sequence

from common.ids import Owner, RequestId
from common.messages.handover import Stopped
from kvstore.index.ledger import PageState
from services.worker.core.watchdog import Fired, Wait, Watchdog, WatchTerms
from tests.services.worker.core.test_endings import prompt, run_until
from tests.support.world import World

TERMS = WatchTerms(stall_ms=1_000.0, step_ms=5_000.0)
TICK_MS = 50.0


def wait(name: str, age_ms: float = 100.0, **more: object) -> Wait:
    return Wait(request=RequestId(name), phase="decode", age_ms=age_ms, **more)  # type: ignore[arg-type]


def watch(
    dog: Watchdog, waits: Sequence[Wait], until_ms: float, from_ms: float = 0.0, *, computing: bool = False
) -> list[tuple[float, Fired]]:
    """Ticks of a worker in which nothing changes: when it fired."""
    found, now_ms = list[tuple[float, Fired]](), from_ms
    while now_ms <= until_ms:
        due = dog.on_tick("the same", now_ms, works=True)
        if due and (fired := dog.look(waits, now_ms, computing=computing)) is not None:
            found.append((now_ms, fired))
        now_ms += TICK_MS
    return found


def test_the_youngest_load_goes_first_then_the_youngest_that_holds_pages_and_nobody_twice() -> None:
    waits = [
        wait("old", 900.0, loads=True),
        wait("young", 200.0, loads=True),
        wait("holds", 10.0, pages=4),
        wait("not"),
    ]
    fired = watch(Watchdog(TERMS), waits, 12_000.0)
    assert [one.end for _, one in fired] == ["young", "old", "holds", None]


def test_it_waits_longer_each_time_while_nothing_changes_and_begins_anew_with_progress() -> None:
    dog = Watchdog(TERMS)
    times = [at for at, _ in watch(dog, [wait("r")], 9_000.0)]
    assert times == [1_000.0, 2_000.0, 4_000.0, 8_000.0]
    assert not dog.on_tick("changed", 9_050.0, works=True)
    assert dog.stalled_ms == 0.0


def test_who_has_no_work_is_never_looked_at() -> None:
    dog = Watchdog(TERMS)
    assert not any(dog.on_tick("the same", TICK_MS * tick, works=False) for tick in range(1_000))


def test_time_in_which_the_process_was_stopped_is_no_standstill() -> None:
    dog = Watchdog(TERMS)
    dog.on_tick("the same", 0.0, works=True)
    assert not dog.on_tick("the same", 600_000.0, works=True)
    assert dog.stalled_ms <= 1_000.0


def test_a_long_step_ends_nobody_and_is_told_only_beyond_its_bound() -> None:
    (first, *_) = watch(Watchdog(TERMS), [wait("r", pages=4)], 6_000.0, computing=True)
    assert first[0] == 5_000.0 and first[1].end is None


def test_a_wait_with_a_deadline_ahead_is_left_alone_and_so_is_who_queues_behind_it() -> None:
    waits = [wait("fills", pages=4, until_ms=4_000.0), wait("asks", waits_for="pages", queued=True)]
    fired = watch(Watchdog(TERMS), waits, 4_500.0)
    assert [at for at, _ in fired] == [4_000.0]
    blocked = [*waits, wait("blocked", pages=1)]
    assert watch(Watchdog(TERMS), blocked, 1_000.0)[0][1].end == "blocked"


def test_no_watch_with_0() -> None:
    assert watch(Watchdog(WatchTerms(stall_ms=0.0)), [wait("r")], 60_000.0) == []


class Hung(deque):
    """Jobs of a thread that does nothing any more."""

    def __bool__(self) -> bool:
        return False


def world(**settings: object) -> World:
    made = World(random.Random(3), prefill_pages=200, decode_pages=200, **{"watchdog_ms": 2_000, **settings})  # type: ignore[arg-type]
    made.greet()
    return made


def tick(target: World, name: str) -> Fired | None:
    """Time passes for all; the watchdog of one looks."""
    target.pass_time(TICK_MS)
    while target.turn():
        pass
    process = target.processes[name]
    overseer = process.core.overseer
    fired = overseer.on_tick(target.now_ms)
    if fired is not None:
        target.perform(process, overseer.carry_out(fired, target.now_ms))
    return fired


def until_fired(target: World, name: str) -> Fired:
    for _ in range(400):
        if (fired := tick(target, name)) is not None:
            return fired
    raise AssertionError("it never fired")


def hang_a_copy(target: World) -> None:
    """A prompt is computed and granted, and the copier does nothing."""
    process = target.processes["prefill"]
    process.copies = Hung()
    target.send("stuck", prompt(9), 4)
    run_until(target, lambda: len(process.copies) > 0)


def test_a_copy_that_never_ends_is_written_down_and_its_request_goes_elsewhere() -> None:
    target = world()
    hang_a_copy(target)
    fired = until_fired(target, "prefill")
    state = target.processes["prefill"].core.overseer.state(target.now_ms)
    while target.turn():
        pass
    assert fired.end == "stuck" and "decode-0" in fired.text
    failed = target.answers[RequestId("stuck")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("stuck", True)
    (told,) = state["requests"]
    assert told["request"] == "stuck" and told["pages"] and told["over"]
    report = target.processes["prefill"].core.report(1, target.now_ms)
    assert report.counters["watchdog_fired_total"] == 1.0 and report.gauges["degraded"] == 1.0 and report.degraded


def test_others_go_on_and_the_worker_recovers() -> None:
    target = world()
    hang_a_copy(target)
    until_fired(target, "prefill")
    process = target.processes["prefill"]
    process.copies = deque(list(process.copies))
    target.send("next", prompt(7), 4)
    target.settle()
    assert target.answers[RequestId("next")].finish == "length"
    target.now_ms += 61_000.0
    assert process.core.report(1, target.now_ms).degraded == ""


def test_a_prefill_worker_whose_prompt_waits_for_a_full_decode_worker_is_not_stuck_and_the_full_one_ends_nobody() -> (
    None
):
    target = world()
    pool = target.processes["decode"].core.pool
    pool.alloc(Owner("test"), 100, PageState.ACTIVE)
    target.send("asks", prompt(9), 4)
    assert all(tick(target, "prefill") is None for _ in range(200))
    fired = until_fired(target, "decode")
    assert fired.end is None and "asks in phase grant waits for pages" in fired.text


def test_quarantined_kv_makes_its_holder_degraded_until_its_writer_speaks() -> None:
    target = world(lease_ms=1_000)
    hang_a_copy(target)
    decode, sender = target.processes["decode"], target.processes["prefill"].peer
    target.perform(decode, decode.core._incoming.on_sender_silent(sender, target.now_ms))
    assert decode.core.report(1, target.now_ms).degraded == ""
    target.now_ms += 16_001.0
    report = decode.core.report(1, target.now_ms)
    assert "longer than its lease" in report.degraded and report.gauges["oldest_held_ms"] > 16_000.0
    (transfer,) = decode.core._incoming._transfers
    target.perform(decode, decode.core.on_message(sender, Stopped(transfer=transfer), target.now_ms))
    assert decode.core.report(1, target.now_ms).degraded == ""
