"""Every posted job ends exactly once, whatever happens to its channel or to the copier."""

import queue
import threading
from collections.abc import Iterator, Sequence

import pytest

from common.errors import PeerFailed
from common.ids import PeerId, TransferId
from common.messages.handover import KvSpan
from kvstore.transport.channel import Copied
from kvstore.transport.copier import Copier, CopyDone, CopyJob

A, B = PeerId("decode@a"), PeerId("decode@b")
WAIT_S = 30


class Gate:
    """A channel whose copies wait until they are let through."""

    kind = "tcp"

    def __init__(self, error: BaseException | None = None, *, is_open: bool = True) -> None:
        self.error, self.entered, self.open = error, threading.Semaphore(0), threading.Event()
        self.log: list[str] = []
        if is_open:
            self.open.set()

    def posted(self, span: KvSpan) -> None:
        del span

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        self.entered.release()
        assert self.open.wait(WAIT_S)
        self.log.append(f"copy {span.layer}")
        if self.error is not None:
            raise self.error
        return Copied(len(source_pages), 100, bytes(source_pages))

    def close(self) -> None:
        self.log.append("close")


def job(layer: int, to: PeerId = A) -> CopyJob:
    return CopyJob(TransferId("t"), to, KvSpan(layer, 0, 1), (layer,), (0,))


Done = queue.SimpleQueue[CopyDone]


@pytest.fixture
def done() -> Done:
    return queue.SimpleQueue()


@pytest.fixture
def copier(done: Done) -> Iterator[Copier]:
    made = Copier(done.put)
    yield made
    made.stop()


def test_jobs_end_in_the_order_they_were_posted(copier: Copier, done: Done) -> None:
    copier.attach(A, Gate())
    for layer in range(20):
        copier.post(job(layer))
    ends = [done.get(timeout=WAIT_S) for _ in range(20)]
    assert [(end.job.span.layer, end.ok, end.payload) for end in ends] == [(n, True, bytes([n])) for n in range(20)]
    assert {(end.n_copies, end.n_bytes) for end in ends} == {(1, 100)}


def test_a_failing_copy_fails_alone(copier: Copier, done: Done) -> None:
    copier.attach(A, Gate(PeerFailed("gone")))
    copier.attach(B, Gate())
    copier.post(job(0))
    copier.post(job(1, B))
    first, second = done.get(timeout=WAIT_S), done.get(timeout=WAIT_S)
    assert (first.ok, first.error_text, second.ok) == (False, "gone", True)
    assert (first.n_copies, first.n_bytes) == (0, 0)


def test_a_job_to_nobody_fails(copier: Copier, done: Done) -> None:
    copier.post(job(0))
    assert done.get(timeout=WAIT_S).error_text == f"no connection to {A}"


def test_detaching_lets_the_running_copy_end_fails_the_rest_and_then_closes(copier: Copier, done: Done) -> None:
    gate = Gate(is_open=False)
    copier.attach(A, gate)
    for layer in range(3):
        copier.post(job(layer))
    assert gate.entered.acquire(timeout=WAIT_S)
    copier.detach(A)
    assert not copier.drain(0.0)
    gate.open.set()
    assert copier.drain(WAIT_S)
    assert [done.get(timeout=WAIT_S).ok for _ in range(3)] == [True, False, False]
    assert gate.log == ["copy 0", "close"]
    assert copier.kind(A) is None


def test_a_job_never_runs_through_a_channel_that_was_attached_after_it_was_posted(copier: Copier, done: Done) -> None:
    busy, old, new = Gate(is_open=False), Gate(), Gate()
    copier.attach(B, busy)
    copier.attach(A, old)
    copier.post(job(0, B))
    assert busy.entered.acquire(timeout=WAIT_S)
    copier.post(job(1))
    copier.attach(A, new)  # as after a re-dial: the pages of job 1 may be anybody's by now
    copier.post(job(2))
    busy.open.set()
    ends = [done.get(timeout=WAIT_S) for _ in range(3)]
    assert [(end.job.span.layer, end.ok) for end in ends] == [(0, True), (1, False), (2, True)]
    assert (old.log, new.log) == (["close"], ["copy 2"])


def test_a_job_posted_before_any_channel_fails_even_if_one_comes(copier: Copier, done: Done) -> None:
    busy, late = Gate(is_open=False), Gate()
    copier.attach(B, busy)
    copier.post(job(0, B))
    assert busy.entered.acquire(timeout=WAIT_S)
    copier.post(job(1))
    copier.attach(A, late)
    busy.open.set()
    assert [done.get(timeout=WAIT_S).ok for _ in range(2)] == [True, False]
    assert late.log == []


def test_stopping_ends_every_job_and_closes_every_channel(done: Done) -> None:
    copier, gate, idle = Copier(done.put), Gate(is_open=False), Gate()
    copier.attach(A, gate)
    copier.attach(B, idle)
    for layer in range(4):
        copier.post(job(layer))
    assert gate.entered.acquire(timeout=WAIT_S)
    stopper = threading.Thread(target=copier.stop)
    stopper.start()
    gate.open.set()
    stopper.join(WAIT_S)
    copier.post(job(9))
    ends = [done.get_nowait() for _ in range(5)]
    assert [end.job.span.layer for end in ends] == [0, 1, 2, 3, 9]
    assert sorted((end.ok for end in ends), reverse=True) == [end.ok for end in ends], "none succeeds after a failure"
    assert not ends[-1].ok
    assert gate.log[-1] == idle.log[-1] == "close"
    assert done.empty()


def test_a_bug_in_a_channel_ends_the_copier_loudly_and_leaves_nobody_waiting(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda args: loud.put(str(args.exc_value)))
    copier, gate = Copier(done.put), Gate(ZeroDivisionError("ours"), is_open=False)
    copier.attach(A, gate)
    copier.post(job(0))
    copier.post(job(1))
    assert gate.entered.acquire(timeout=WAIT_S)
    gate.open.set()
    assert [done.get(timeout=WAIT_S).ok for _ in range(2)] == [False, False]
    assert loud.get(timeout=WAIT_S) == "ours"
    copier.post(job(2))
    assert not done.get(timeout=WAIT_S).ok
    copier.stop()
