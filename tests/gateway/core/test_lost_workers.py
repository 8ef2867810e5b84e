"""A worker that vanished is remembered until it is back, for ten minutes at most, and so are 64 of them at most."""

from common.messages.liveness import Welcome
from gateway.core.dispatch import Dispatch
from gateway.core.lost_workers import LostWorkers
from tests.gateway.core.builders import SILENT_MS, dispatch, member, peer, report


def names(lost: LostWorkers, now_ms: float, *here: str) -> list[str]:
    return [one.member.id for one in lost.missing(set(here), now_ms)]  # type: ignore[arg-type]


def silence_of_prefill(core: Dispatch) -> None:
    """Until the gateway gives prefill-0 up; the other one goes on answering."""
    for now_ms in range(0, int(SILENT_MS) + 200, 100):
        core.on_message(peer("decode-0"), report("decode-0"), float(now_ms))
        core.on_tick(float(now_ms))


def test_a_loss_is_remembered_for_ten_minutes_or_until_the_worker_is_back() -> None:
    lost = LostWorkers()
    lost.add(member("decode-0"), "died", 0.0)
    lost.add(member("prefill-0"), "died", 1.0)
    assert names(lost, 2.0) == ["decode-0", "prefill-0"]
    assert names(lost, 3.0, "decode-0") == ["prefill-0"]
    assert names(lost, 4.0) == ["prefill-0"]
    assert names(lost, 600_002.0) == []


def test_of_too_many_losses_the_eldest_is_forgotten() -> None:
    lost = LostWorkers()
    for number in range(70):
        lost.add(member(f"decode-{number}"), "died", float(number))
    lost.add(member("decode-30"), "died again", 70.0)
    assert len(names(lost, 71.0)) == 64
    assert names(lost, 71.0)[0] == "decode-6" and names(lost, 71.0)[-1] == "decode-30"


def test_a_silent_worker_is_lost_and_counted_until_it_answers_again() -> None:
    core = dispatch("prefill-0", "decode-0")
    silence_of_prefill(core)
    (gone,) = core.lost(SILENT_MS + 200.0)
    assert (gone.member.id, gone.text) == ("prefill-0", "died (silent for 3.1 s)")
    assert core.counters()["workers_lost_total{role=prefill}"] == 1.0
    core.on_members([member("prefill-0", 2), member("decode-0")], SILENT_MS + 300.0)
    assert [one.member.id for one in core.lost(SILENT_MS + 300.0)] == ["prefill-0"], "listed is not alive"
    core.on_message(peer("prefill-0", 2), Welcome(member=member("prefill-0", 2)), SILENT_MS + 400.0)
    assert core.lost(SILENT_MS + 400.0) == []


def test_a_worker_that_was_drained_is_not_missed() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.drain(member("prefill-0").id, on=True)
    silence_of_prefill(core)
    assert [one.member.id for one in core.workers(SILENT_MS + 100.0)] == ["decode-0"]
    assert core.lost(SILENT_MS + 100.0) == []
    assert not any(series.startswith("workers_lost") for series in core.counters())
