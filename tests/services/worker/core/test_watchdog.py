"""A worker that stands still is seen and the youngest gives way; one that is only slow, or waits rightly, is left alone."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from common.block_hash import hash_blocks, root_hash
from common.ids import Owner, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Release
from common.messages.handover import HandOver, Stopped
from common.messages.requests import Failed
from kvstore.index.ledger import PageState
from services.worker.core.actions import Copy
from services.worker.core.laggards import Laggards
from services.worker.core.watchdog import Fired, Wait, Watchdog, WatchTerms
from tests.services.worker.core.test_endings import prompt, run_until
from tests.support.world import World
from tests.support.world_process import MODEL

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


def silence_the_writer(target: World) -> None:
    hang_a_copy(target)
    decode, sender = target.processes["decode"], target.processes["prefill"].peer
    target.perform(decode, decode.core._incoming.on_sender_silent(sender, target.now_ms))


def test_kv_whose_writer_is_paused_is_no_standstill_of_who_holds_it() -> None:
    target = world(lease_ms=30_000)
    silence_the_writer(target)
    overseer = target.processes["decode"].core.overseer
    began_ms = target.now_ms
    while target.now_ms < began_ms + 90_000.0:
        target.now_ms += TICK_MS
        assert overseer.on_tick(target.now_ms) is None
        assert bool(overseer.degraded(target.now_ms)) == (target.now_ms > began_ms + 45_000.0)


def test_who_queues_behind_such_kv_is_told_once_lease_and_grace_are_over() -> None:
    held = wait("held", pages=4, until_ms=3_000.0, over=True, theirs=True)
    fired = watch(Watchdog(TERMS), [held, wait("asks", waits_for="pages", queued=True)], 3_500.0)
    assert [(at, one.end) for at, one in fired] == [(3_000.0, None)]


def test_a_lease_that_is_out_is_a_wait_with_a_deadline() -> None:
    target = world(caching=2)
    target.send("r", prompt(9), 4)
    target.settle()
    decode, reader = target.processes["decode"], target.processes["prefill"].peer
    names = hash_blocks(tuple(prompt(9)), root_hash(MODEL, ""), 4)
    find = Find(call=1, blocks=tuple(names[:1]), lease_ms=8_000)
    target.perform(decode, decode.core.on_message(reader, find, target.now_ms))
    assert not decode.core.idle
    for _ in range(140):
        target.now_ms += TICK_MS
        assert decode.core.overseer.on_tick(target.now_ms) is None
    target.perform(decode, decode.core.on_message(reader, Release(call=1), target.now_ms))
    assert decode.core.idle


def test_a_prompt_that_was_handed_over_has_the_time_in_which_commit_must_come() -> None:
    target = world()
    process = target.processes["prefill"]
    link = process.peer, target.processes["decode"].peer
    target.send("r", prompt(9), 4)
    run_until(target, lambda: any(isinstance(one, HandOver) for one, _ in target.links.get(link, ())))
    (told,) = process.core.overseer.state(target.now_ms)["requests"]
    assert told["phase"] == "transfer" and 7_900 <= told["until_ms"] <= 8_000


def give_up(target: World, name: str, request: str) -> list[Failed]:
    """The watchdog of one has chosen it: what its worker tells of that."""
    process = target.processes[name]
    actions = process.core.overseer.carry_out(Fired("", 15_000.0, RequestId(request)), target.now_ms)
    target.perform(process, actions)
    return [one.message for one in actions if isinstance(one, Send) and isinstance(one.message, Failed)]


def test_a_transfer_that_is_given_up_ends_for_its_gateway_and_waits_for_its_writer() -> None:
    target = world()
    hang_a_copy(target)
    (failed,) = give_up(target, "decode", "stuck")
    assert (failed.code, failed.phase, failed.retryable) == ("stuck", "transfer", True)
    assert target.processes["decode"].core.pool.ledger.counts().quarantined > 0


def test_an_answer_that_is_given_up_ends_for_its_gateway_and_its_pages_are_free() -> None:
    target = world()
    target.send("stuck", prompt(9), 300, to="decode")
    run_until(target, lambda: len(target.answers[RequestId("stuck")].tokens) > 3)
    (failed,) = give_up(target, "decode", "stuck")
    target.settle()
    core = target.processes["decode"].core
    assert (failed.code, failed.phase, failed.retryable) == ("stuck", "decode", True)
    assert core.idle and core.pool.available_pages == 200


def test_who_is_not_here_is_given_up_by_nobody() -> None:
    assert give_up(world(), "decode", "unknown") == [] == give_up(world(), "prefill", "unknown")


# -- one beside others


def lag(laggards: Laggards, waits: Sequence[Wait], n_looks: int) -> list[tuple[str, float]]:
    found = [laggards.look(waits, 1_000.0, 0.0) for _ in range(n_looks)]
    return [(one[0].request, one[1]) for one in found if one is not None]


def test_who_does_not_move_while_others_do_is_told_once() -> None:
    laggards, still = Laggards(3_000.0), wait("still", progress=1)
    assert lag(laggards, [still], 10) == [("still", 3_000.0)]
    moved = replace(still, progress=2)
    assert lag(laggards, [moved], 3) == [] and lag(laggards, [moved], 2) == [("still", 3_000.0)]


def test_who_queues_has_time_is_over_or_waits_for_another_process_lags_behind_nobody() -> None:
    waits = [
        wait("queues", queued=True),
        wait("has time", until_ms=1.0),
        wait("is over", over=True),
        wait("theirs", theirs=True),
    ]
    assert lag(Laggards(3_000.0), waits, 10) == []


def test_only_what_something_holds_is_ended() -> None:
    dog = Watchdog(TERMS)
    assert dog.tell_alone(wait("r", waits_for="load 1"), 5_000.0, 0.0).end == "r"
    assert dog.tell_alone(wait("r"), 5_000.0, 0.0).end is None
    assert dog.tell_alone(wait("r", waits_for="load 1", in_step=True), 5_000.0, 0.0).end is None
    assert dog.fired_total == 3 and dog.fired_lately(0.0)


class Swallows(deque):
    """Does all copies but those of the first transfer that comes."""

    transfer = None

    def append(self, copy: Copy) -> None:
        self.transfer = self.transfer or copy.order.transfer
        if copy.order.transfer != self.transfer:
            super().append(copy)


def test_one_prompt_whose_copies_never_end_is_given_up_while_others_are_answered() -> None:
    target = world()
    process = target.processes["prefill"]
    process.copies = Swallows()
    process.core.overseer._laggards = Laggards(3_000.0)
    target.send("stuck", prompt(9), 4)
    fired, number = None, 0
    while fired is None and number < 200:
        number += 1
        target.send(f"r{number}", prompt(5), 2)
        fired = tick(target, "prefill")
    while target.turn():
        pass
    assert fired is not None and (fired.end, fired.alone) == ("stuck", True)
    failed = target.answers[RequestId("stuck")].failed
    assert failed is not None and failed.code == "stuck" and "others did" in failed.text
    assert target.answers[RequestId("r1")].finish == "length"
