import asyncio
from collections.abc import Iterator, Mapping

from loadgen.results.timeline import LeakCheck
from loadgen.server.api import NoAnswer
from loadgen.server.leaks import check_leaks, grown


def test_what_others_held_before_and_what_went_away_is_no_leak() -> None:
    assert grown({"a": 5.0, "b": 2.0}, {"a": 5.0, "b": 1.0, "c": 0.0}) == {}
    assert grown({"a": 5.0}, {"a": 6.0, "b": 1.0}) == {"a": (5.0, 6.0), "b": (0.0, 1.0)}


def check(looks: Iterator[Mapping[str, float] | Exception], **terms: float) -> LeakCheck | None:
    async def look() -> Mapping[str, float]:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    return asyncio.run(check_leaks({}, look, **{"settled_s": 0.0, "every_s": 0.0, "deadline_s": 60.0, **terms}))


def test_what_is_given_back_late_is_waited_for() -> None:
    found = check(iter([{"pages": 2.0}, NoAnswer("busy"), ValueError("half a page"), {"pages": 1.0}, {"pages": 0.0}]))
    assert found is not None and found.held == {}


def forever(found: Mapping[str, float] | Exception) -> Iterator[Mapping[str, float] | Exception]:
    while True:
        yield found


def test_what_is_never_given_back_is_a_leak() -> None:
    found = check(forever({"pages": 2.0}), deadline_s=0.01)
    assert found is not None and found.held == {"pages": (0.0, 2.0)}
    assert found.waited_s >= 0.01


def test_a_server_that_is_gone_gives_no_verdict() -> None:
    assert check(forever(NoAnswer("gone")), deadline_s=0.01) is None


def test_a_clean_look_too_soon_proves_nothing() -> None:
    """Reports may be older than the last request: what they do not show yet must be seen all the same."""
    late = iter([{"pages": 0.0}, *forever_after()])
    found = check(late, settled_s=0.01, deadline_s=0.02)
    assert found is not None and found.held == {"pages": (0.0, 1.0)}


def forever_after() -> Iterator[Mapping[str, float]]:
    return iter([{"pages": 1.0}] * 100_000)


def test_looks_that_came_too_soon_and_none_after_them_prove_nothing() -> None:
    for held in (0.0, 1.0):
        gone = iter([{"pages": held}, *[NoAnswer("gone")] * 100_000])
        assert check(gone, settled_s=0.005, deadline_s=0.01) is None
