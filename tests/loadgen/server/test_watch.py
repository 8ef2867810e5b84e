import asyncio
import time
from collections.abc import Iterator

import pytest

from loadgen.results.timeline import ServerView
from loadgen.server.api import ServerApi
from loadgen.server.probe import Probe, probe
from loadgen.server.watch import Watch
from tests.loadgen.fake_server import fake_server, steady
from tests.loadgen.server.pages import status, vllm, worker


def watch(path: str, pages: Iterator[bytes | int], looks: int, *, late: bool = False) -> ServerView:
    """Watch a server that gives one page after the other, then the last one for ever; until it was asked so often."""

    async def talk() -> ServerView:
        seen, enough, last = 0, asyncio.Event(), b""

        def page() -> bytes | int:
            nonlocal seen, last
            seen += 1
            if seen >= looks:
                enough.set()
            last = next(pages, last)
            return last

        async with fake_server(steady()) as fake, ServerApi(fake.url, {}) as api:
            fake.pages[path] = page
            found = await probe(api, "fake")
            start_s = time.monotonic()
            async with Watch(api, found, every_s=0.0) as watching:
                await enough.wait()
                start_s = time.monotonic() if late else start_s
                view = await watching.finish(start_s, settled_s=0.0, deadline_s=0.05)
            assert all(0.0 <= one.at_s <= time.monotonic() - start_s for one in view.samples)
            return view

    return asyncio.run(talk())


def running(n: int) -> bytes:
    return status(worker("m", "mixed", queue={"running": n}, pages={"active": n}), open_requests=n)


def test_the_timeline_is_what_the_server_said_in_order() -> None:
    view = watch("/status", iter([running(0), running(0), *map(running, (1, 2, 3)), running(0)]), looks=6)
    assert view.source == "/status of Penstock"
    assert [one.running for one in view.samples][:5] == [0, 1, 2, 3, 0]
    times_s = [one.at_s for one in view.samples]
    assert times_s == sorted(times_s)
    assert (view.failed_polls, view.leak_check and view.leak_check.held) == (0, {})


def test_the_status_before_and_after_is_kept() -> None:
    view = watch("/status", iter([running(0), running(7), running(2)]), looks=3)
    assert view.before is not None and view.before["gateway"]["open_requests"] == 7
    assert view.after is not None and view.after["gateway"]["open_requests"] == 2
    assert view.leak_check is not None and view.leak_check.held == {}, "seven were held before"


def test_what_stays_is_a_leak() -> None:
    view = watch("/status", iter([running(0), running(0), running(2)]), looks=3)
    assert view.leak_check is not None
    assert view.leak_check.held == {
        "gateway: open requests": (0, 2),
        "m: active pages": (0, 2),
        "m: running requests": (0, 2),
    }


def test_failed_polls_are_counted_and_told_and_harm_nothing() -> None:
    view = watch("/status", iter([running(0), running(0), 500, b"{", running(1), running(0)]), looks=6)
    assert view.failed_polls == 2
    assert "/status" in view.poll_failure
    assert 1 in [one.running for one in view.samples]


def test_samples_of_the_warm_up_are_left_out() -> None:
    view = watch("/status", iter([running(0), running(0), *map(running, (5, 5, 5)), running(0)]), looks=20, late=True)
    assert 5 not in [one.running for one in view.samples]


def test_metrics_of_other_servers_are_watched_alike() -> None:
    view = watch("/metrics", iter([vllm(0, 0, 0.0), vllm(0, 0, 0.0), vllm(2, 3, 0.5), vllm(2, 0, 0.5)]), looks=4)
    assert view.source == "/metrics of vLLM"
    assert (2, 3, 0.5) in [(one.running, one.waiting, one.kv_used) for one in view.samples]
    assert (view.before, view.after) == (None, None)
    assert view.leak_check is not None and view.leak_check.held == {"running requests": (0, 2)}


def test_a_server_that_tells_nothing_is_not_asked() -> None:
    async def talk() -> tuple[ServerView, int]:
        async with fake_server(steady()) as fake, ServerApi(fake.url, {}) as api:
            unknown = Probe(source=None, told="nobody knows", context_tokens=None)
            async with Watch(api, unknown, every_s=0.0) as watching:
                return await watching.finish(0.0), len(fake.asked)

    view, asked = asyncio.run(talk())
    assert (view, asked) == (ServerView(source="nobody knows"), 0)


def test_a_server_that_went_away_leaves_no_verdict() -> None:
    view = watch("/status", iter([running(0), running(0), running(1), *[503] * 100_000]), looks=5)
    assert view.leak_check is None
    assert view.failed_polls >= 2
    assert (view.before is None, view.after is None) == (False, True)


def test_a_leak_check_that_cannot_be_made_is_told() -> None:
    after = watch("/status", iter([running(0), running(0), running(1), *[503] * 100_000]), looks=5)
    assert after.leak_check_failed.startswith("after the run: GET /status: HTTP 503")
    before = watch("/status", iter([running(0), 500, running(0)]), looks=3)
    assert (before.leak_check, before.leak_check_failed[:39]) == (None, "before the run: GET /status: HTTP 500: ")


@pytest.mark.parametrize(("asked", "told"), [(True, "GET /status: HTTP 500"), (False, "")])
def test_a_leak_check_without_a_source_is_told_if_it_was_asked_for(asked: bool, told: str) -> None:
    async def talk() -> ServerView:
        async with fake_server(steady()) as fake, ServerApi(fake.url, {}) as api:
            fake.pages["/status"] = lambda: 500
            async with Watch(api, await probe(api, "fake")) as watching:
                return await watching.finish(0.0, leak_check=asked)

    view = asyncio.run(talk())
    assert view.leak_check is None
    assert view.leak_check_failed.startswith(told) and bool(view.leak_check_failed) is asked


@pytest.mark.parametrize("value", [b"+Inf", b"NaN", b"1e400", b"{", b'{a="b", ="d"} 3'])
def test_no_number_of_a_server_fails_a_run(value: bytes) -> None:
    page = b"vllm:num_requests_running " + value + b"\nvllm:num_requests_waiting 2\n"
    page = page.replace(b" {", b"{")
    view = watch("/metrics", iter([page]), looks=4)
    assert view.samples or view.poll_failure


def test_a_document_that_is_not_worth_keeping_is_left_out() -> None:
    deep = running(0)[:-1] + b', "x": ' + b"[" * 40 + b"]" * 40 + b"}"
    view = watch("/status", iter([deep]), looks=3)
    assert (view.before, view.after, view.failed_polls) == (None, None, 0)
    assert view.leak_check is not None


def test_a_look_that_failed_once_is_no_leak_check_that_failed() -> None:
    async def talk() -> ServerView:
        async with fake_server(steady()) as fake, ServerApi(fake.url, {}) as api:
            fake.pages["/status"] = lambda: running(0)
            async with Watch(api, await probe(api, "fake"), every_s=60.0) as watching:
                pages = iter([running(0), 500])
                fake.pages["/status"] = lambda: next(pages, running(0))
                return await watching.finish(0.0, settled_s=0.0)

    view = asyncio.run(talk())
    assert (view.leak_check is None, view.leak_check_failed) == (False, "")
